"""fedsim: personalised federated adapter tuning of frozen vision transformers, simulated at scale on Ray.

As a library::

    import fedsim

    result = fedsim.run(fedsim.load("quickstart", ["algorithm=ditto", "seed=1"]))
    result.summary["accuracy"]["mean"], result.rounds(), result.clients(), result.adapters(7)
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.callbacks import Callback as Callback
    from fedsim.config import load as load
    from fedsim.simulation import Result as Result
    from fedsim.simulation import resume as resume
    from fedsim.simulation import run as run

__version__ = "0.1.0"

# In a checkout that was not installed (`ray job submit --working-dir .`), algorithms/, envs/ and configs/ stand beside
# this package; only there is the folder above searched for fedsim.algorithms, fedsim.envs and fedsim.configs.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "algorithms").is_dir():
    __path__.append(str(_root))

_HOMES = {
    "run": "simulation",
    "resume": "simulation",
    "Result": "simulation",
    "load": "config",
    "Callback": "callbacks",
}


def __getattr__(name: str) -> Any:
    """Imported when asked for: `import fedsim` alone takes no torch and no Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"fedsim.{_HOMES[name]}"), name)
