"""Schedules: how the operators' TensorIR maps to targets (design spaces), and the tuned records, one JSON file per target."""
