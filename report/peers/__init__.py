"""Other engines, measured beside gristmill, each by a Python of its own that has it and no gristmill.

So nothing but the standard library, numpy and the engine is imported here, by relative imports alone, and
this folder is what such a Python is started with; see __main__.py.
"""
