"""Clients that do one thing differently: `VARIANTS`, by name, for ablations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.study.exchange import own_alphas, through_files
from hetlora_agg import ClientUpdate, LowRank, align_rounds
from hetlora_agg.simulate import SIDES
from hetlora_agg.simulate.federation import Results, Server, Stream
from hetlora_agg.simulate.local import Adapter, Slots
from hetlora_agg.simulate.network import Network, fresh_adapter
from hetlora_agg.simulate.sides import Slice

Sides = Mapping[str, type[Slice]]


def own_start(side: type[Slice]) -> type[Slice]:
    """Every client draws its own fresh adapter: slot j means something else to each."""

    class OwnStart(side):  # type: ignore[misc, valid-type]
        def hand_out(
            self, server: Server, cohort: Sequence[int], number: int
        ) -> list[dict[str, LowRank]]:
            """A draw for each client as long as there is no result; then as usual."""
            if server.results is not None:
                return list(super().hand_out(server, cohort, number))
            federation = self.federation
            return [
                fresh_adapter(
                    federation.network,
                    federation.settings.ranks[client],
                    federation.generator(Stream.START, number - 1, client),
                )
                for client in cohort
            ]

    return OwnStart


def scaling_ignored(side: type[Slice]) -> type[Slice]:
    """The server takes all scalings for that of the largest rank, in what arrives and leaves."""

    class ScalingIgnored(side):  # type: ignore[misc, valid-type]
        def common(self) -> dict[str, float]:
            """The scaling of a client of the largest rank, by layer."""
            ranks = self.federation.settings.ranks
            return dict(self.scaling(ranks.index(max(ranks))))

        def updates(
            self,
            client: int,
            scaling: Mapping[str, float],
            sent: Adapter,
            slots: Slots | None = None,
        ) -> dict[str, ClientUpdate]:
            """The client's factors in the name of the common scaling."""
            return dict(super().updates(client, self.common(), sent, slots))

        def hand_out(
            self, server: Server, cohort: Sequence[int], number: int
        ) -> list[dict[str, LowRank]]:
            """The common scaling divided out in place of the client's own."""
            handed, common = super().hand_out(server, cohort, number), self.common()
            if server.results is None:
                return list(handed)
            turned = []
            for client, adapter in zip(cohort, handed, strict=True):
                own = self.scaling(client)
                root = {name: math.sqrt(own[name] / common[name]) for name in adapter}
                turned.append(
                    {n: LowRank(root[n] * a.A, root[n] * a.B) for n, a in adapter.items()}
                )
            return turned

    return ScalingIgnored


def aligned(by: str) -> Callable[[type[Slice]], type[Slice]]:
    """Every result is written as much like the last round's as may be."""

    def change(side: type[Slice]) -> type[Slice]:
        class Aligned(side):  # type: ignore[misc, valid-type]
            def absorb(self, server: Server, results: Results, whole: Network) -> Server:
                """The results turned, for clients to continue from whole if not in slices."""
                after: Server = super().absorb(server, results, whole)
                if server.results is None or after.results is None:
                    return after
                turned = {
                    name: align_rounds(result, server.results[name].factors, by=by)
                    for name, result in results.items()
                }
                return Server(after.network, whole, turned)

        return Aligned

    return change


def on_all(change: Callable[[type[Slice]], type[Slice]]) -> Sides:
    """The client sides that train slices, changed."""
    changed = {name: change(SIDES[name]) for name in ("slice", "restart", "prune")}
    return {**SIDES, **changed}


VARIANTS: Mapping[str, Sides] = {
    "usual": SIDES,
    "own start": on_all(own_start),
    "scaling ignored": on_all(scaling_ignored),
    "signs": on_all(aligned("signs")),
    "rotation": on_all(aligned("rotation")),
    "restarting": {**SIDES, "slice": SIDES["restart"]},
    "unpruned": {**SIDES, "prune": SIDES["slice"]},
    "peft files": {name: through_files(own_alphas(side)) for name, side in SIDES.items()},
}
"""Client sides by the name of what is different."""
