"""The tuner: searches of declared knobs, each candidate measured in a process apart."""
