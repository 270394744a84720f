from .api.hardware import hardware_import_vela, hardware_list, hardware_show, measure
from .api.networks import debug, ptq, train
from .api.results import dashboard, export_run, import_config, report
from .api.runs import finalize, front, rank, resume, run, status, trust
from .api.studies import check, inspect
from .cost.model import cost_of
from .errors import MpsearchError
from .exporters.export import export
from .exporters.native import load
from .exporters.read import read_config
from .graph.attention import open_attention
from .graph.layers import inspect_model
from .metric import Metric
from .observer import Observer
from .precision import LayerPrecision, Precision, PrecisionConfig
from .quant.network import QuantizedNetwork
from .quant.prepare import prepare, prepare_for_training
from .search.run import run_study
from .study import load_study

__version__: str

__all__ = [
    "LayerPrecision",
    "Metric",
    "MpsearchError",
    "Observer",
    "Precision",
    "PrecisionConfig",
    "QuantizedNetwork",
    "__version__",
    "check",
    "cost_of",
    "dashboard",
    "debug",
    "export",
    "export_run",
    "finalize",
    "front",
    "hardware_import_vela",
    "hardware_list",
    "hardware_show",
    "import_config",
    "inspect",
    "inspect_model",
    "load",
    "load_study",
    "measure",
    "open_attention",
    "prepare",
    "prepare_for_training",
    "ptq",
    "rank",
    "read_config",
    "report",
    "resume",
    "run",
    "run_study",
    "status",
    "train",
    "trust",
]
