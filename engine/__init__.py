"""The model as a function: checkpoints, preprocessing, towers, engines, backends."""
