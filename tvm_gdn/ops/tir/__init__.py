"""TensorIR definitions: the compiler tier of the operators. Only `tvm_gdn.build` imports these modules."""
