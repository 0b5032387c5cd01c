"""Training with any model, optimizer, rule and objective, in one or several processes, with bit-exact resumption."""

from backpass.allocator import keep_freed_memory
from backpass.training.adversary import AdversarialTraining
from backpass.training.amplified import Amplified
from backpass.training.batches import Batch
from backpass.training.half_batches import half_losses
from backpass.training.interruption import Interrupted
from backpass.training.learning_rate import ControlledLR
from backpass.training.logs import Logger
from backpass.training.objective import BinaryCrossEntropy, CrossEntropy, Evaluated, Objective, PerSample
from backpass.training.processes import local_device
from backpass.training.progress import Progress, TrainingResult
from backpass.training.robust_evaluation import RobustEvaluation
from backpass.training.trainer import Trainer

__all__ = [
    "AdversarialTraining",
    "Amplified",
    "Batch",
    "BinaryCrossEntropy",
    "ControlledLR",
    "CrossEntropy",
    "Evaluated",
    "Interrupted",
    "Logger",
    "Objective",
    "PerSample",
    "Progress",
    "RobustEvaluation",
    "Trainer",
    "TrainingResult",
    "half_losses",
    "keep_freed_memory",
    "local_device",
]
