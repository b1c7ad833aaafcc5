"""What the tests of exports share: requests as the command line makes them."""

from tvm_gdn import cli
from tvm_gdn.commands import arguments
from tvm_gdn.export import onnx_layer
from tvm_gdn.export.artifact import Request
from tvm_gdn.ops import OPS

CHUNK = "chunk_gated_delta_rule"
UPDATE = "fused_recurrent_gated_delta_rule_update"
FUSED = "fused_conv_gated_delta_rule_update"
SIGMOID = "fused_sigmoid_gating_delta_rule_update"
LAYER = onnx_layer.SPEC
HEADS = (("H", 2), ("HV", 4))
#: Optional tensors of a convolution over packed sequences on a pool.
CONV = ("conv_states", "has_initial_state", "query_start_loc", "cache_indices", "bias")
#: A tree of speculated tokens on packed sequences.
PACKED_TREE = "with=initial_state_source+initial_state_indices+cu_seqlens+intermediate_states_buffer+retrieve_parent_token"


def request(op, dims="", **options):
    """A request of `--op` and `--dims`."""
    spec = LAYER if op == LAYER.name else OPS[op]
    return Request(spec, arguments.parse_dims(spec, dims), **options)


def run(*words):
    """The exit status of ``tvm_gdn export`` with these words."""
    return cli.main(["export", *map(str, words)])
