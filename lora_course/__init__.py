"""What the course needs beside the library: claims, tables, figures, exercises, experiments."""

from lora_course.figures import visualize_lora_hyperparameters

__all__ = ["visualize_lora_hyperparameters"]
