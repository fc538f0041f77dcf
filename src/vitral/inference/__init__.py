"""Inference with trained weights."""

from vitral.inference.predict import Classifier, Prediction, find_images, load

__all__ = ["Classifier", "Prediction", "find_images", "load"]
