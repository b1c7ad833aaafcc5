"""``tvm_gdn bench``: contenders, timing and reports."""
