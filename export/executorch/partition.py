"""Decides which nodes XNNPACK gets, and in which delegate: deterministically, with as few delegates as possible.

ExecuTorch's own partitioner merges sets of nodes in no fixed order, so two runs of the same export can differ in the
number of delegates and in the bytes of the file.
"""

import operator
from unittest.mock import patch

import torch
from executorch.backends.xnnpack.partition.config import gemm_configs, generic_node_configs, xnnpack_config
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.backend.canonical_partitioners.config_partitioner import format_target_name
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from torch.export import ExportedProgram
from torch.fx import Node

# These operators cover the whole network except the embedding, the caches, the attention of full-attention layers, and
# the indices and masks of a step. Each class knows the constraints of its operator, and which nodes belong to it (for a
# linear layer the constants, the dequantization and the rounding).
DELEGATED = (
    gemm_configs.LinearConfig,
    generic_node_configs.AddConfig,
    generic_node_configs.BMMConfig,
    generic_node_configs.CatConfig,
    generic_node_configs.CloneConfig,
    generic_node_configs.CosConfig,
    generic_node_configs.MulConfig,
    generic_node_configs.PermuteConfig,
    generic_node_configs.ReciprocalSquareRootConfig,
    generic_node_configs.SigmoidConfig,
    generic_node_configs.SinConfig,
    generic_node_configs.SoftmaxConfig,
    generic_node_configs.SubConfig,
    generic_node_configs.ViewCopyConfig,
)
# XNNPACK's backend runs 17 passes over every delegate, for images, batch norms and stock attention. With this option it
# runs only the one that could change this graph (ConvertToLinear). The 17 passes took half of the time of an export.
ONE_PASS = CompileSpec("dqlinear_partitioner", b"")


class LevelPartitioner(Partitioner):  # type: ignore[misc]
    """Puts all delegated nodes of one level into one delegate.

    A node's level is the largest number of times that a path to it enters or leaves XNNPACK. Levels never decrease
    along an edge and increase at every crossing, so no delegate depends on its own output. With ``apart``, nodes of a
    level that no edges connect become separate delegates, and concatenations, which would connect them, stay outside.
    Delegates with the same computation are then equal to the byte. Slices are delegated too, as no length is dynamic.
    """

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        self.apart = apart
        self.spec_for_all = DelegationSpec(XnnpackBackend.__name__, [ONE_PASS])
        kinds = set(DELEGATED)
        if apart:
            kinds = kinds - {generic_node_configs.CatConfig} | {generic_node_configs.SliceCopyConfig}
        self.operators = {kind.target_name: kind() for kind in kinds}

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag each delegated node with its delegate."""
        nodes = [node for node in exported_program.graph.nodes if node.op == "call_function"]
        # XNNPACK takes no empty tensors, so its configurations refuse a length that depends on data (the number of rows
        # of logits) without asking for its bounds. Ours is at least 1, which their next question, for the number of
        # elements, finds.
        with patch.object(xnnpack_config, "has_free_unbacked_symbols", lambda value: False):
            members = {node: self.members(node, exported_program) for node in nodes}
        delegated = {member for group in members.values() for member in group}
        levels: dict[Node, int] = {}
        by_tag: dict[str, list[Node]] = {}
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
                by_tag.setdefault(f"level{levels[node]}", []).extend(members[node])
        if self.apart:
            by_tag = {
                f"{tag}.{index}": part for tag, group in by_tag.items() for index, part in enumerate(connected(group))
            }
        for tag, group in by_tag.items():
            for index, member in enumerate(group):
                member.meta["delegation_tag"] = tag
                if self.apart:
                    member.meta["debug_handle"] = index  # all else in a delegate is independent of its place
        tags = dict.fromkeys(by_tag, self.spec_for_all)
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)

    def members(self, node: Node, program: ExportedProgram) -> list[Node]:
        """``node`` and the nodes that belong to it, if it is delegated; otherwise an empty list."""
        assert callable(node.target)
        kind = self.operators.get(format_target_name(node.target.__name__))
        if kind is None or is_view_of_cache(node) or not kind.check_constraints(node, program):
            return []
        return kind.get_partition(node, program)


def is_view_of_cache(node: Node) -> bool:
    """Is ``node`` a view of a cache? Outside XNNPACK it costs nothing; inside, it would copy the cache in every call.

    A cache is a buffer, as it is or as an operator that writes it in place returns it.
    """
    assert callable(node.target)
    source = node.args[0] if node.args else None
    if format_target_name(node.target.__name__) != "view_copy.default" or not isinstance(source, Node):
        return False
    if source.op == "call_function" and source.target is operator.getitem:
        (source,) = source.all_input_nodes
        return source.target is torch.ops.higher_order.auto_functionalized_v2 or "update_cache" in str(source.target)
    return source.op == "placeholder"


def connected(nodes: list[Node]) -> list[list[Node]]:
    """The connected components of ``nodes``; each keeps the order of ``nodes``."""
    piece_of: dict[Node, list[Node]] = {}
    for node in dict.fromkeys(nodes):
        joined = [node]
        for neighbour in (*node.all_input_nodes, *node.users):
            other = piece_of.get(neighbour)
            if other is not None and other is not joined:
                joined = other + joined
                for member in joined:
                    piece_of[member] = joined
        for member in joined:
            piece_of[member] = joined
    return list({id(piece): piece for piece in piece_of.values()}.values())
