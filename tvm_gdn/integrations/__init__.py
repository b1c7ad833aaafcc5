"""Drop-in use of tvm_gdn from other projects: one module per project, which imports that project only when used."""
