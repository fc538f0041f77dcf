"""Look at every image of a data set: counts, sizes, broken files, speed of decoding."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vitral.config import DataConfig
from vitral.data.decode import DecodeError, decode
from vitral.data.sampling import Integers
from vitral.data.sources import Files, Pixels, Records, open_dataset
