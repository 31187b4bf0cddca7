"""Training, evaluation and export of the models."""
