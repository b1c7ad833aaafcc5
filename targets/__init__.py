"""Target descriptors: data only, one TOML file per target (see `tvm_gdn/target.py`)."""
