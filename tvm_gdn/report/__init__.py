"""``tvm_gdn report``: one HTML page from recorded benchmark and parity runs.

`data` reads the JSON files, `compare` finds regressions, `matrix` says what works where, `charts` draws, `page` fills the
template. Only `charts` and `page` need the extra ``report`` (jinja2, matplotlib).
"""
