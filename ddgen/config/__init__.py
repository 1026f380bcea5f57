"""Every setting, once.

A command's settings are one dataclass made of groups; every field is one flag of the same name
(``train_batch_size`` is ``--train_batch_size``) and one key of a YAML file. Defaults live here and nowhere
else; ``None`` means "derived", and the text below the field says from what. This package imports no torch, so
``--help`` answers at once.
"""

from ddgen.config.commands import (
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    LabelConfig,
    ReportConfig,
    SampleConfig,
    TrainConfig,
    TrainObserverConfig,
)
from ddgen.config.groups import (
    FAST,
    STEPS,
    AutoencoderConfig,
    DataConfig,
    DenoiserConfig,
    GuidanceConfig,
    MonitorConfig,
    ObserverConfig,
    OptimizerConfig,
    RunConfig,
    Sampler,
    Selection,
)
from ddgen.config.reading import from_flat_dict, parse, read_yaml, settings, to_flat_dict, write_yaml

__all__ = [
    "FAST",
    "STEPS",
    "AutoencoderConfig",
    "DataConfig",
    "DenoiserConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GuidanceConfig",
    "LabelConfig",
    "MonitorConfig",
    "ObserverConfig",
    "OptimizerConfig",
    "ReportConfig",
    "RunConfig",
    "SampleConfig",
    "Sampler",
    "Selection",
    "TrainConfig",
    "TrainObserverConfig",
    "from_flat_dict",
    "parse",
    "read_yaml",
    "settings",
    "to_flat_dict",
    "write_yaml",
]
