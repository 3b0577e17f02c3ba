"""Triton's interpreter beside a numpy that makes no index of an array of one number (2.4 and on)."""

import importlib.util
from typing import Any

if importlib.util.find_spec("triton"):
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_tensor(tensor: Any, scope: Any) -> None:
        """Gives interpreted scalars the index that loops over a range of them need."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor
