"""Which operators XNNPACK runs together: as many as can, in one pass over the graph."""

from __future__ import annotations

from collections import defaultdict

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.passes.infra.partitioner import Partition


class StagedPartitioner(XnnpackPartitioner):
    """XNNPACK's partitioner with another way to put together what it matched.

    ExecuTorch's own tries every pair of matches, and can give two partitions that wait for each other. Here a node's
    stage is the number of times that a path to it leaves XNNPACK; what XNNPACK takes of one stage is a partition. A
    path out of it and back comes to a later stage, so that partitions wait for earlier ones alone.
    """

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """Partitions of what XNNPACK's configurations match."""
        matches = self.get_matched_nodes_from_configs(ep)
        match_of = {node: index for index, match in enumerate(matches) for node in match}
        stages = _stages(list(ep.graph_module.graph.nodes), match_of)
        found: dict[int, list[Node]] = defaultdict(list)
        for index, match in enumerate(matches):
            found[stages[index]] += match
        return [Partition(id=stage, nodes=nodes) for stage, nodes in sorted(found.items())]


def _stages(nodes: list[Node], match_of: dict[Node, int]) -> dict[int, int]:
    """The stage of each match, all nodes of which belong together.

    Args:
        nodes: of the graph, in its order.
        match_of: the match of each node that XNNPACK takes.
    """
    stages: dict[int, int] = defaultdict(int)
    outside: dict[Node, int] = defaultdict(int)
    # A match may reach over nodes that wait for others: once more until nothing changes, two or three times.
    for _ in range(len(match_of) + 2):
        changed = False
        for node in nodes:
            match = match_of.get(node)
            # Weights have no stage: each partition gets those that it reads.
            inputs = [item for item in node.all_input_nodes if item.op == "call_function"]
            waits = max(
                (
                    outside[item] if (other := match_of.get(item)) is None else stages[other] + (match is None)
                    for item in inputs
                ),
                default=0,
            )
            before = outside[node] if match is None else stages[match]
            if waits > before:
                changed = True
                if match is None:
                    outside[node] = waits
                else:
                    stages[match] = waits
        if not changed:
            return stages
    raise RuntimeError("XNNPACK takes operators together that wait for others in between.")
