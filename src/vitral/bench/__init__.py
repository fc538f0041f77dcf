"""Rates: of the model beside its peers, of training, and of the input beside torchvision's."""

from vitral.bench.data import bench_data
from vitral.bench.model import bench_model
from vitral.bench.train import bench_train, plan

__all__ = ["bench_data", "bench_model", "bench_train", "plan"]
