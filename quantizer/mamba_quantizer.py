"""`MambaQuantizer`: annotates an exported Mamba graph, role by role, for torchao's pt2e flow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from mq_ao.backends import DEFAULT, get_backend
from mq_ao.errors import MqAoError
from mq_ao.graph import Match, Rejection, Role, match, walk
from mq_ao.graph.walk import module_path
from mq_ao.quantizer.annotator import Annotator, carries, is_annotated
from mq_ao.quantizer.cached_rows import cached_rows
from mq_ao.quantizer.carried_states import CarriedState, carried_states
from mq_ao.quantizer.kernels import Kernels, check_executable
from mq_ao.quantizer.planning import plan_state, plan_weight, separate_weights, weight_requests
from mq_ao.quantizer.report import Decision, QuantizationReport
from mq_ao.quantizer.specs import CARRIED, LINEAR_ROLES, Activation, QuantizationConfig, RoleSpec, in_words
from mq_ao.quantizer.weights import QuantizedWeight
from mq_ao.statistics import ChannelStatistics, Request
from mq_ao.statistics.probe import flat_states_name

_OFF = "switched off by the configuration"
_WITHOUT_KERNEL: Mapping[object, str] = {
    walk.aten.conv2d.default: "there is no integer kernel for convolutions over two axes",
}


class MambaQuantizer(Quantizer):
    """Quantizes the roles of Mamba blocks, the embedding and the head.

    A node's spec is that of the longest `set_module_name` that holds it, else of `set_role`, else of `set_global`.

    Args:
        backend: whose kernels the result must fit; see `mq_ao.backends.BACKENDS`.

    Example:
        >>> quantizer = MambaQuantizer().set_global(w8a8()).set_role("head", None)
        >>> prepared = prepare_pt2e(program.module(), quantizer)
        >>> print(quantizer.report)
    """

    def __init__(self, backend: str = DEFAULT.name) -> None:
        super().__init__()
        self.kernels: Kernels = get_backend(backend).lowering.KERNELS
        self._global: QuantizationConfig | None = None
        self._roles: dict[Role, RoleSpec | None] = {}
        self._modules: dict[str, QuantizationConfig | None] = {}
        self._match: Match | None = None
        self._report: QuantizationReport | None = None
        self._statistics: Mapping[str, ChannelStatistics] = {}
        self._planned: dict[Node, QuantizedWeight] = {}
        self._scales: dict[Node, Tensor] = {}

    def set_global(self, config: QuantizationConfig) -> MambaQuantizer:
        """Sets the spec of every role that nothing more specific is said of."""
        for role, spec in config.roles.items():
            check_executable(self.kernels, role, spec)
        self._global = config
        return self

    def set_role(self, role: Role | str, spec: RoleSpec | None) -> MambaQuantizer:
        """Sets the spec of one role; None leaves it in float."""
        role = Role.parse(role)
        if spec is not None:
            check_executable(self.kernels, role, spec)
        self._roles[role] = spec
        return self

    def set_module_name(self, name: str, config: QuantizationConfig | None) -> MambaQuantizer:
        """Sets the specs inside one submodule, for example "backbone.layers.0"; None leaves it in float."""
        for role, spec in (config.roles if config is not None else {}).items():
            check_executable(self.kernels, role, spec)
        self._modules[name] = config
        return self

    @property
    def report(self) -> QuantizationReport:
        """What the last `annotate` accepted and rejected.

        Raises:
            MqAoError: nothing was annotated yet.
        """
        if self._report is None:
            raise MqAoError("nothing was annotated yet: pass this quantizer to prepare_pt2e first.")
        return self._report

    def set_statistics(self, statistics: Mapping[str, ChannelStatistics]) -> MambaQuantizer:
        """Gives what GPTQ, Fisher rounding and int8 carried states need; see `requests`."""
        self._statistics = statistics
        return self

    def check(self, model: GraphModule) -> None:
        """Raises MqAoError if the backend has no operator for a scan of the graph; to be called before long work."""
        if self.kernels.experts is None:
            walk.check_experts(model, self.kernels.backend)

    def requests(self, model: GraphModule) -> list[Request]:
        """What `set_statistics` has to be given for this graph: for roundings that learn, and for carried states."""
        found = match(model)
        states = [
            Request(flat_states_name(scan))
            for scan, state in self._carried_states(found).items()
            if isinstance(state, CarriedState)
        ]
        weights = [
            request for role, node in found.by_role() for request in weight_requests(node, self.spec(role, node))
        ]
        return [*weights, *states]

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Rounds the weights, and chooses the carried states' scales; calibration still runs in float.

        Raises:
            MqAoError: a rounding that learns or an int8 carried state was asked for and no statistics were given; the
                backend has no operator for a scan; or the graph is not in float32.
        """
        self.check(model)
        found = match(model)
        for scan, state in self._carried_states(found).items():
            if isinstance(state, CarriedState) and scan not in self._scales:
                self._scales[scan] = plan_state(scan, self._statistics)
        layers = [(node, spec) for role, node in found.by_role() if (spec := self.spec(role, node)) is not None]
        separate_weights(model, layers)
        for node, spec in layers:
            if node not in self._planned and not is_annotated(node):
                _check_dtype(node)
                planned = plan_weight(model, node, spec, self._statistics)
                self._planned[node] = planned.with_group_scale(self.kernels.group_scale)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotates every node that a spec was set for.

        Raises:
            MqAoError: nothing was set, the graph has no scan, or a module name is not in the graph.
        """
        if self._global is None and not self._roles and not self._modules:
            raise MqAoError("the quantizer has nothing to do: call set_global, set_role or set_module_name first.")
        self.transform_for_annotation(model)  # for those who call this method alone; planned weights are kept
        self._match = match(model)
        pairs = self._match.by_role()
        self._check_module_names([node for _, node in pairs])
        annotator = Annotator(self._planned, self.kernels)
        parts: list[tuple[Role, Node, Mapping[str, Node] | None]] = [(role, node, None) for role, node in pairs]
        parts += [part for block in self._match.blocks for part in block.operands()]
        # In the graph's order: what several nodes read is observed at the first of them, and the others refer to it.
        decisions = [self._decide(annotator, *part) for part in sorted(parts, key=lambda part: part[1])]
        for scan, state in self._carried_states(self._match).items():
            decisions.append(self._decide_state(annotator, scan, state))
        for node, rows in cached_rows(model).items():
            decisions += self._decide_cache(annotator, node, rows)
        decisions += [Decision(item.node, "", None, False, item.reason) for item in self._match.rejected]
        if self.kernels.integer_outputs:
            for role, node in pairs:
                spec = self.spec(role, node)
                if role in LINEAR_ROLES and spec is not None and spec.activation is Activation.STATIC:
                    annotator.outputs(node, spec)
        self._report = QuantizationReport(tuple(decisions))
        return model

    def validate(self, model: GraphModule) -> None:
        """Checks that everything that was asked for carries its annotation.

        Raises:
            MqAoError: a role was set that no node has, or a node with a spec is not annotated; it is named.
        """
        assert self._match is not None, "prepare_pt2e calls annotate first"
        pairs = self._match.by_role()
        known = {decision.role for decision in self.report.decisions}
        for role, spec in self._roles.items():
            if spec is not None and role not in known:
                reasons = (
                    "; ".join(f"{item.node}: {item.reason}" for item in self._match.rejected) or "none was left out"
                )
                raise MqAoError(f"set_role({role.value!r}) was called, but no node has that role ({reasons}).")
        for role, node in pairs:
            spec = self.spec(role, node)
            if spec is not None and not carries(node, spec):
                raise MqAoError(f"{node.name} ({role}) was to be quantized ({spec}), but its annotation was lost.")

    def _check_module_names(self, nodes: list[Node]) -> None:
        paths = {module_path(node) for node in nodes}
        for name in self._modules:
            if not any(_inside(path, name) for path in paths):
                raise MqAoError(
                    f"no quantizable node lies in a module named {name!r}; the modules are "
                    f"{', '.join(sorted(path for path in paths if path))}."
                )

    def spec(self, role: Role, node: Node) -> RoleSpec | None:
        """How a node with a role is quantized; None where it stays in float."""
        asked = self._asked(role, node)
        return None if self._lack(node, asked) else asked

    def _lack(self, node: Node, spec: RoleSpec | None) -> str | None:
        """Why a node stays in float whatever was asked for."""
        if spec is not None and node.target in walk.EXPERTS and spec.activation not in (self.kernels.experts or ()):
            return f"backend {self.kernels.backend!r} has no integer kernel for experts with {spec.input}"
        return _WITHOUT_KERNEL.get(node.target)

    def _asked(self, role: Role, node: Node) -> RoleSpec | None:
        path = module_path(node)
        names = [name for name in self._modules if _inside(path, name)]
        if names:
            config = self._modules[max(names, key=len)]
            return None if config is None else config.roles.get(role)
        if role in self._roles:
            return self._roles[role]
        return None if self._global is None else self._global.roles.get(role)

    def _decide(
        self, annotator: Annotator, role: Role, node: Node, operands: Mapping[str, Node] | None = None
    ) -> Decision:
        path, spec = module_path(node), self.spec(role, node)
        if spec is None:
            return Decision(node.name, path, role, False, self._lack(node, self._asked(role, node)) or _OFF)
        if is_annotated(node):
            return Decision(node.name, path, role, False, "already annotated by another quantizer")
        if operands is not None:
            annotator.inputs(node, tuple(operands.values()), spec)
            return Decision(node.name, path, role, True, f"{spec.input}: {', '.join(operands)}")
        annotator.layer(node, spec)
        return Decision(node.name, path, role, True, annotator.describe(node, spec))

    def _carried_states(self, found: Match) -> dict[Node, CarriedState | Rejection]:
        """The carried states that are to be quantized, by scan."""
        scans = (direction.scan for direction in found.directions)
        return carried_states(scan for scan in scans if self.spec(Role.CARRIED_STATE, scan) is not None)

    def _decide_state(self, annotator: Annotator, scan: Node, state: CarriedState | Rejection) -> Decision:
        role, path = Role.CARRIED_STATE, module_path(scan)
        if isinstance(state, Rejection):
            return Decision(scan.name, path, role, False, state.reason)
        if is_annotated(state.initial):
            return Decision(scan.name, path, role, False, "already annotated by another quantizer")
        annotator.state(state, self._scales[scan])
        return Decision(scan.name, path, role, True, CARRIED)

    def _decide_cache(
        self, annotator: Annotator, node: Node, rows: tuple[Node, Node] | Rejection
    ) -> Iterator[Decision]:
        role, path, spec = Role.KV_CACHE, module_path(node), self.spec(Role.KV_CACHE, node)
        if spec is None:
            return
        if isinstance(rows, Rejection):
            yield Decision(node.name, path, role, False, rows.reason)
        elif any(map(is_annotated, rows)):
            yield Decision(node.name, path, role, False, "already annotated by another quantizer")
        else:
            annotator.cache(rows, spec)
            yield Decision(node.name, path, role, True, in_words(role, spec))


def _check_dtype(node: Node) -> None:
    """Kernels, and what simulates them, give float32 around the integers."""
    for source in node.all_input_nodes:
        dtype = source.meta["val"].dtype if isinstance(source.meta.get("val"), Tensor) else torch.float32
        if dtype.is_floating_point and dtype != torch.float32:
            where = module_path(node) or node.name
            raise MqAoError(
                f"{where} computes in {str(dtype).removeprefix('torch.')}: give mq_ao.export a model in float32 "
                "(model.float()), or the model itself to mq_ao.quantize."
            )


def _inside(path: str, name: str) -> bool:
    return path == name or path.startswith(name + ".")
