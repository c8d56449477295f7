"""One sentence or two about any layer, operation or quantizer of a quantized model: what it is, who reads it, and why."""

import difflib
from dataclasses import dataclass

from qat.surgery.decide import QuantizationPlan
from qat.surgery.frames import image_address
from qat.surgery.layers import FLOAT
from qat.surgery.observe import Observation
from qat.surgery.plan import LAYOUTS, TABULATED, is_integer
from qat.surgery.trace import MULTIPLIES, Call


@dataclass(frozen=True)
class Explanation:
    """Answers from what `quantize_` saw and decided."""

    seen: Observation
    plan: QuantizationPlan

    def of(self, name: str) -> str:
        """name: of a layer ("layer1.0.conv1"), an operation ("layer1.0#add0") or a quantizer ("layer1.0.conv1.weight").

        Raises ValueError naming the nearest known names.
        """
        layer = self._layer_named(name)
        if layer is not None:
            return self._layer(layer)
        calls = [call for call in self.seen.trace.calls if call.address == name]
        if calls:
            return self._operation(calls[0])
        for position, value in enumerate(self.seen.trace.model_inputs):
            if name == image_address(position) and name in self.plan.placement.points:
                why = "quantized to 8 bits since it joins an integer operation"
                return (
                    f"{name}: the model's input, {why}. Read by {self._readers(value)}."
                )
        known = [*self.plan.specs, *(call.address for call in self.seen.trace.calls)]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else "print the table of quantize_ for the names there are"
        )
        raise ValueError(
            f"{name}: is not a layer, an operation or a quantizer of this model; {hint}"
        )

    def _layer_named(self, name: str) -> str | None:
        for candidate in (
            name,
            name.removesuffix(".weight"),
            name.removesuffix(".input"),
        ):
            if candidate in self.plan.specs:
                return candidate
        return None

    def _layer(self, name: str) -> str:
        spec, rule = self.plan.specs[name], self.plan.patterns[name]
        asleep = self.seen.asleep.get(name)
        if asleep == "idle":
            return f"{name}: not quantized, since the example does not reach it in eval mode."
        if asleep == "constant":
            return f"{name}: not quantized, since it sees nothing that depends on the image; the file holds its result."
        calls = self.seen.calls.get(name) or self.seen.unquantizable.get(name, [])
        readers = self._readers(calls[0].outputs[0]) if calls else "nobody"
        if spec == FLOAT:
            return f"{name}: in floating point by rule {rule!r}. Read by {readers}."
        weight = (
            "in floating point"
            if spec.weight is None
            else f"quantized to {spec.weight}"
        )
        text = f"{name}: weight {weight} by rule {rule!r}; input {self._input(name, calls)}. Result {self._result(calls[0])}"
        return f"{text}. Read by {readers}."

    def _input(self, name: str, calls: list[Call]) -> str:
        spec = self.plan.specs[name].input
        source = self._source(calls[0].inputs[0])
        if spec is None:
            return f"in floating point, from {source}"
        if name in self.plan.placement.on_grid and self._reads_codes(name):
            return f"read as the 8-bit codes of {source}"
        return f"quantized to {spec} by the layer itself, from {source}"

    def _reads_codes(self, name: str) -> bool:
        asked = self.plan.wrapped.get(name)
        if asked is None:
            asked = next(
                (
                    other.spec
                    for other in self.plan.operands.values()
                    if other.name == name
                ),
                None,
            )
        return asked is not None and asked.input is None

    def _operation(self, call: Call) -> str:
        inputs = ", ".join(dict.fromkeys(self._source(value) for value in call.inputs))
        text = f"{call.address}: {call.kind} of {inputs}"
        if call.kind in MULTIPLIES:
            return f"{text}, of layer {call.layer}. {self._layer(call.layer)}"
        return (
            f"{text}; {self._result(call)}. Read by {self._readers(call.outputs[0])}."
        )

    def _result(self, call: Call) -> str:
        address = call.address
        if address in self.plan.placement.points:
            if is_integer(call) and self._feeds_a_table(call):
                return "quantized to 8 bits, so that the function that reads it is a table, as its rule asks"
            if is_integer(call):
                return "quantized to 8 bits, since it is an integer operation that more than one layer's own quantizer reads"
            return "quantized to 8 bits, since it joins an integer operation or a layer with one-bit inputs"
        if address in self.plan.placement.absorbed:
            return (
                "part of the layer before it: the file has no separate operation for it"
            )
        if call.kind in LAYOUTS:
            return "only moves values, so codes stay codes"
        if is_integer(call):
            return "not quantized by itself: its one reader quantizes it, or the model's output is in floating point"
        return "in floating point: it is not a product, a sum or a concat of codes"

    def _feeds_a_table(self, call: Call) -> bool:
        if call.kind not in MULTIPLIES:
            return False
        readers = self.seen.trace.consumers().get(call.outputs[0], [])
        return all(reader.kind in TABULATED for reader in readers)

    def _source(self, value: int) -> str:
        producer = self.seen.trace.producer()
        call = producer.get(value)
        while call is not None and call.kind in LAYOUTS:
            value = call.inputs[0]
            call = producer.get(value)
        return "the model's input" if call is None else self._name(call)

    def _readers(self, value: int) -> str:
        names: dict[str, None] = {}
        self._collect_readers(value, names)
        return ", ".join(names) or "nobody"

    def _collect_readers(self, value: int, names: dict[str, None]) -> None:
        if value in self.seen.trace.model_outputs:
            names["the model's output"] = None
        for reader in self.seen.trace.consumers().get(value, []):
            if reader.kind in LAYOUTS or reader.address in self.plan.placement.absorbed:
                for out in reader.outputs:
                    self._collect_readers(out, names)
            else:
                names[self._name(reader)] = None

    def _name(self, call: Call) -> str:
        if call.kind not in MULTIPLIES:
            return call.address
        spec = self.plan.specs[call.layer].input
        bits = "" if spec is None else f" ({spec.bits}-bit input)"
        return f"{call.layer}{bits}"
