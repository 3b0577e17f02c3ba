"""The harness's own command line, which knows the model because this package is imported first."""

import sys

from gristmill.runtime.errors import GristmillError

if __name__ == "__main__":
    try:
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except GristmillError as error:
        sys.exit(f"error: {error}")
