"""Checkpoints of training, over any topology: whole or not at all, and the newest whole one on loading."""

from replica_newton.checkpoints.dcp import ReplicaState
from replica_newton.checkpoints.folder import CheckpointError
from replica_newton.checkpoints.training_state import Checkpoint, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "ReplicaState", "load_checkpoint", "save_checkpoint"]
