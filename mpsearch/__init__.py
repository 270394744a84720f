"""mpsearch: AutoML search for mixed-precision quantization.

Bit-widths and quantizer types, per layer, on the Pareto front of quality against hardware cost.

    import mpsearch
    result = mpsearch.run("digits", trials=24)
    print(result.front.table)

The names are listed, with their types, in `__init__.pyi`; each is imported when it is first used, so that `import
mpsearch` is light. Every command is a function of its name (`import` is `import_config`, `export` is `export_run`).
"""

import getpass
import os
import sys
from types import ModuleType

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]

try:
    getpass.getuser()
except (KeyError, OSError, ImportError):  # a container's user has a number alone; torch names its folders by a name
    os.environ["LOGNAME"] = str(os.getuid())


class _Package(ModuleType):
    """`mpsearch.ptq`, `train`, `debug` and `report` are the functions, whatever has been imported before.

    Subpackages have these names too, and Python puts a subpackage that is imported in the place of its name.
    `from mpsearch.ptq.pipeline import ...` finds it all the same.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and value is sys.modules.get(f"{__name__}.{name}")):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
