"""Which nodes XNNPACK gets, and in which delegate: deterministic, and as few delegates as the graph allows.

ExecuTorch's own partitioner unites sets of nodes, so that the number of delegates differs between two runs of the
same export, and with it the bytes of the file.
"""

from executorch.backends.xnnpack.partition.config import gemm_configs, generic_node_configs
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.backend.canonical_partitioners.config_partitioner import format_target_name
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from torch.export import ExportedProgram
from torch.fx import Node

# Everything of the network but the embedding, the caches, attention and a step's indices and masks. Each knows the
# constraints of its operator, and which nodes belong to it (a linear's constants, dequantization and rounding).
DELEGATED = (
    gemm_configs.LinearConfig,
    generic_node_configs.AddConfig,
    generic_node_configs.CatConfig,
    generic_node_configs.CloneConfig,
    generic_node_configs.CosConfig,
    generic_node_configs.MulConfig,
    generic_node_configs.PermuteConfig,
    generic_node_configs.ReciprocalSquareRootConfig,
    generic_node_configs.SigmoidConfig,
    generic_node_configs.SinConfig,
    generic_node_configs.SubConfig,
    generic_node_configs.ViewCopyConfig,
)
# XNNPACK's backend runs 17 passes over every delegate, for images, batch norms and stock attention, unless this option
# asks for the only one that could concern this graph (ConvertToLinear). They took half of the time of an export.
ONE_PASS = CompileSpec("dqlinear_partitioner", b"")


class LevelPartitioner(Partitioner):  # type: ignore[misc]
    """One delegate for all delegated nodes of a level: how often the way to them enters or leaves XNNPACK.

    Levels never fall along an edge and rise at every crossing, so no delegate depends on itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spec_for_all = DelegationSpec(XnnpackBackend.__name__, [ONE_PASS])
        self.operators = {kind.target_name: kind() for kind in DELEGATED}

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        nodes = [node for node in exported_program.graph.nodes if node.op == "call_function"]
        members = {node: self.members(node, exported_program) for node in nodes}
        delegated = {member for group in members.values() for member in group}
        levels: dict[Node, int] = {}
        tags: dict[str, DelegationSpec] = {}
        for node in nodes:
            levels[node] = max(
                (
                    levels[source] + ((source in delegated) != (node in delegated))
                    for source in node.all_input_nodes
                    if source in levels
                ),
                default=0,
            )
            if members[node]:
                tag = f"level{levels[node]}"
                tags[tag] = self.spec_for_all
                for member in members[node]:
                    member.meta["delegation_tag"] = tag
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)

    def members(self, node: Node, program: ExportedProgram) -> list[Node]:
        """A delegated operator and the nodes that go with it; nothing for what stays outside."""
        assert callable(node.target)
        operator = self.operators.get(format_target_name(node.target.__name__))
        if operator is None or not operator.check_constraints(node, program):
            return []
        return operator.get_partition(node, program)
