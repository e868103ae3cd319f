"""Every knob of a run, by subject. Torch-free; validated on the login node."""

from nanoslime.config.algorithm import AlgorithmConfig, GRPOConfig
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.evaluation import EvalConfig, EvalSetConfig
from nanoslime.config.model import DataConfig, ModelConfig, RehearsalConfig
from nanoslime.config.rollout import RolloutConfig, WeightSyncConfig
from nanoslime.config.run import RunConfig
from nanoslime.config.training import CheckpointConfig, TrackingConfig, TrainingConfig
