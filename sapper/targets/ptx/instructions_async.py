"""Rows of barriers, fences, atomic operations, asynchronous copies, clusters and cache control.

Source: PTX ISA, sections "Parallel Synchronization and Communication Instructions", "Data Movement and Conversion
Instructions: Asynchronous copy", "Tensor copy", "mbarrier", "Miscellaneous Instructions".
"""

from __future__ import annotations

from typing import Any

from .rows import Row, make_row

ROWS: list[Row] = []
_SHARED = "shared shared::cta"
_ANY_SHARED = "shared shared::cta shared::cluster"
_SCOPES = "cta cluster gpu sys"
_CLUSTER = {"cluster": "7.8 sm_90", "shared::cluster": "7.8 sm_90"}
_NO_CLUSTER = {"cluster": "scope gpu", "shared::cluster": "global memory"}
_SYNC = "Parallel Synchronization and Communication Instructions"
_MOVE = "Data Movement and Conversion Instructions"


def row(name: str, syntax: str, operands: str, unit: str, **more: Any) -> None:
    more.setdefault("section", _SYNC)
    ROWS.append(make_row(name, syntax, operands, None, unit=unit, **more))


def _barriers() -> None:
    row("bar.sync", "bar{.cta}.sync", "r:u32 r:u32?", "barrier", needs={"cta": "7.8 sm_80"})
    row("bar.arrive", "bar{.cta}.arrive", "r:u32 r:u32", "barrier", needs={"cta": "7.8 sm_80"})
    row("bar.red", "bar{.cta}.red.popc.u32", "w:u32 r:u32 r:u32^pred r:pred?", "barrier", needs={"cta": "7.8 sm_80"})
    row("bar.red.pred", "bar{.cta}.red.op.pred", "w:pred r:u32 r:u32^pred r:pred?", "barrier", op="and or",
        needs={"cta": "7.8 sm_80"})
    row("barrier.sync", "barrier{.cta}.sync{.aligned}", "r:u32 r:u32?", "barrier", needs={"cta": "7.8 sm_80"})
    row("barrier.arrive", "barrier{.cta}.arrive{.aligned}", "r:u32 r:u32", "barrier", needs={"cta": "7.8 sm_80"})
    row("barrier.cluster.arrive", "barrier.cluster.arrive{.sem}{.aligned}", "", "cluster_barrier",
        sem="release relaxed",
        needs={"": "7.8 sm_90", "release": "8.0 sm_90", "relaxed": "8.0 sm_90"}, instead="bar.sync")
    row("barrier.cluster.wait", "barrier.cluster.wait{.acquire}{.aligned}", "", "cluster_barrier",
        needs={"": "7.8 sm_90", "acquire": "8.0 sm_90"}, instead="bar.sync")
    row("membar", "membar.level", "", "fence", level="cta gl sys")
    row("fence", "fence{.sem}.scope", "", "fence", sem="sc acq_rel acquire release", scope=_SCOPES,
        needs={"cluster": "7.8 sm_90", "acquire": "8.6 sm_80", "release": "8.6 sm_80"},
        instead=_NO_CLUSTER)
    row("fence.mbarrier_init", "fence.mbarrier_init.release.cluster", "", "fence", needs="8.0 sm_90",
        instead="bar.sync")
    row("fence.proxy.alias", "fence.proxy.alias", "", "fence", needs="7.5 sm_80")
    row("fence.proxy.async", "fence.proxy.async", "", "fence_proxy", needs="8.0 sm_90",
        instead="nothing: no async proxy")
    row("fence.proxy.async.space", "fence.proxy.async.space", "", "fence_proxy",
        space="global shared::cta shared::cluster",
        needs="8.0 sm_90", instead="nothing: no async proxy")
    row("fence.proxy.tensormap", "fence.proxy.tensormap::generic.acquire.scope", "m: i:", "fence", scope=_SCOPES,
        needs="8.3 sm_90", instead="tensor maps made by the host")
    row("fence.proxy.tensormap.release", "fence.proxy.tensormap::generic.release.scope", "", "fence", scope=_SCOPES,
        needs="8.3 sm_90", instead="tensor maps made by the host")


def _mbarriers() -> None:
    row("mbarrier.init", "mbarrier.init{.space}.b64", "m: r:u32", "mbarrier", space=_SHARED)
    row("mbarrier.inval", "mbarrier.inval{.space}.b64", "m:", "mbarrier", space=_SHARED)
    ordered: dict[str, Any] = {"sem": "release relaxed", "scope": "cta cluster", "space": _ANY_SHARED}
    needs = {"cluster": "8.0 sm_90", "shared::cluster": "8.0 sm_90", "release": "8.0 sm_80", "cta": "8.0 sm_80",
             "relaxed": "8.6 sm_90"}
    for name in ("expect_tx", "complete_tx"):
        row(f"mbarrier.{name}", f"mbarrier.{name}{{.relaxed.scope}}{{.space}}.b64", "m: r:u32", "mbarrier",
            scope="cta cluster", space=_ANY_SHARED, needs={"": "8.0 sm_90"}, instead="count arrivals")
    for name in ("arrive", "arrive_drop"):
        row(f"mbarrier.{name}", f"mbarrier.{name}{{.sem.scope}}{{.space}}.b64", "w:b64 m: r:u32?", "mbarrier",
            needs=needs, instead={**_NO_CLUSTER, "relaxed": "release"}, **ordered)
        row(f"mbarrier.{name}.expect_tx", f"mbarrier.{name}.expect_tx{{.sem.scope}}{{.space}}.b64",
            "w:b64 m: r:u32", "mbarrier", needs={**needs, "": "8.0 sm_90"}, instead={"": "cp.async.mbarrier.arrive"},
            **ordered)
        row(f"mbarrier.{name}.noComplete", f"mbarrier.{name}.noComplete{{.space}}.b64", "w:b64 m: r:u32", "mbarrier",
            space=_SHARED)
    for name in ("test_wait", "try_wait"):
        base = {"": "7.8 sm_90"} if name == "try_wait" else {}
        instead = {"": "mbarrier.test_wait in a loop"} if name == "try_wait" else {}
        hint = " r:u32?" if name == "try_wait" else ""
        waiting: dict[str, Any] = {"sem": "acquire relaxed", "scope": "cta cluster", "space": _SHARED}
        level = {"acquire": "8.0 sm_80", "cta": "8.0 sm_80", "relaxed": "8.6 sm_90", "cluster": "8.0 sm_90"}
        weaker = {"relaxed": "acquire", "cluster": "scope cta"}
        row(f"mbarrier.{name}", f"mbarrier.{name}{{.sem.scope}}{{.space}}.b64", f"w:pred m: r:b64{hint}",
            "mbarrier", needs={**base, **level}, instead={**weaker, **instead}, **waiting)
        row(f"mbarrier.{name}.parity", f"mbarrier.{name}.parity{{.sem.scope}}{{.space}}.b64",
            f"w:pred m: r:u32{hint}", "mbarrier", needs={**(base or {"": "7.1 sm_80"}), **level},
            instead={**weaker, **instead}, **waiting)
    row("mbarrier.pending_count", "mbarrier.pending_count.b64", "w:u32 r:b64", "mbarrier")


def _asynchronous() -> None:
    common: dict[str, Any] = {"section": _MOVE}
    prefetch = "L2::64B L2::128B L2::256B"
    row("cp.async.ca", "cp.async.ca.space.global{.L2::cache_hint}{.prefetch}", "m: m: i:u32 r:u32^pred? r:b64?",
        "cp_async", space=_SHARED, prefetch=prefetch, **common)
    row("cp.async.cg", "cp.async.cg.space.global{.L2::cache_hint}{.prefetch}", "m: m: i:u32 r:u32^pred? r:b64?",
        "cp_async", space=_SHARED, prefetch=prefetch, **common)
    row("cp.async.commit_group", "cp.async.commit_group", "", "cp_async", **common)
    row("cp.async.wait_group", "cp.async.wait_group", "i:u32", "cp_async", **common)
    row("cp.async.wait_all", "cp.async.wait_all", "", "cp_async", **common)
    row("cp.async.mbarrier.arrive", "cp.async.mbarrier.arrive{.noinc}{.space}.b64", "m:", "cp_async", space=_SHARED,
        **common)
    bulk: dict[str, Any] = {"needs": {"": "8.0 sm_90", "shared::cta": "8.0 sm_90"}, "instead": "cp.async",
                            "section": _MOVE}
    row("cp.async.bulk.load", "cp.async.bulk.target.global.mbarrier::complete_tx::bytes{.multicast::cluster}"
        "{.L2::cache_hint}", "m: m: r:u32 m: r:u16? r:b64?", "bulk", target="shared::cluster shared::cta",
        section=_MOVE, needs={"": "8.0 sm_90", "shared::cta": "8.6 sm_90"},
        instead={"": "cp.async", "shared::cta": "shared::cluster"})
    row("cp.async.bulk.cluster", "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes",
        "m: m: r:u32 m:", "bulk", **bulk)
    row("cp.async.bulk.store", "cp.async.bulk.global.shared::cta.bulk_group{.L2::cache_hint}", "m: m: r:u32 r:b64?",
        "bulk", **bulk)
    for name, op, type in (("add", "add", "u32 s32 u64 f32 f64"), ("min", "min max", "u32 s32 u64 s64"),
                           ("inc", "inc dec", "u32"), ("bits", "and or xor", "b32 b64")):
        row(f"cp.reduce.async.bulk.{name}",
            "cp.reduce.async.bulk.global.shared::cta.bulk_group{.L2::cache_hint}.op.type",
            "m: m: r:u32 r:b64?", "bulk", op=op, type=type, **bulk)
    row("cp.reduce.async.bulk.half",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group{.L2::cache_hint}.add.noftz.type",
        "m: m: r:u32 r:b64?", "bulk", type="f16 bf16", **bulk)
    row("cp.async.bulk.prefetch", "cp.async.bulk.prefetch.L2.global{.L2::cache_hint}", "m: r:u32 r:b64?", "hint",
        **bulk)
    dimensions = "1d 2d 3d 4d 5d"
    row("cp.async.bulk.tensor.load", "cp.async.bulk.tensor.dim.target.global{.tile}.mbarrier::complete_tx::bytes"
        "{.multicast::cluster}{.L2::cache_hint}", "m: m: m: r:u16? r:b64?", "tensor", dim=dimensions,
        target="shared::cluster shared::cta", section=_MOVE, needs={"": "8.0 sm_90", "shared::cta": "8.6 sm_90"},
        instead={"": "cp.async", "shared::cta": "shared::cluster"})
    row("cp.async.bulk.tensor.store", "cp.async.bulk.tensor.dim.global.shared::cta{.tile}.bulk_group{.L2::cache_hint}",
        "m: m: r:b64?", "tensor", dim=dimensions, **bulk)
    row("cp.reduce.async.bulk.tensor", "cp.reduce.async.bulk.tensor.dim.global.shared::cta.op{.tile}.bulk_group"
        "{.L2::cache_hint}", "m: m: r:b64?", "tensor", dim=dimensions, op="add min max and or xor", **bulk)
    row("cp.async.bulk.prefetch.tensor", "cp.async.bulk.prefetch.tensor.dim.L2.global{.tile}{.L2::cache_hint}",
        "m: r:b64?", "hint", dim=dimensions, **bulk)
    row("cp.async.bulk.commit_group", "cp.async.bulk.commit_group", "", "bulk_group", **bulk)
    row("cp.async.bulk.wait_group", "cp.async.bulk.wait_group{.read}", "i:u32", "bulk_group", **bulk)
    row("st.async", "st.async{.weak}{.shared::cluster}.mbarrier::complete_tx::bytes{.vec}.type", "m: r:type*vec m:",
        "st_async", vec="v2 v4", type="b32 b64 u32 u64 s32 s64 f32 f64", needs="8.1 sm_90", section=_MOVE,
        instead="st.global and a flag by red.release.gpu")
    for name, op, type in (("add", "add", "u32 s32 u64"), ("min", "min max", "u32 s32"), ("inc", "inc dec", "u32"),
                           ("bits", "and or xor", "b32")):
        row(f"red.async.{name}", "red.async.relaxed.cluster{.shared::cluster}.mbarrier::complete_tx::bytes.op.type",
            "m: r:type m:", "st_async", op=op, type=type, needs="8.1 sm_90",
            instead="red.global and a flag by red.release.gpu")
    row("prefetch", "prefetch{.space}.level", "m:", "hint", space="global local", level="L1 L2", **common)
    row("prefetch.evict", "prefetch.global.level", "m:", "hint", level="L2::evict_last L2::evict_normal",
        needs="7.4 sm_80", **common)
    row("prefetchu", "prefetchu.L1", "m:", "hint", **common)
    row("prefetch.tensormap", "prefetch{.space}.tensormap", "m:", "hint", space="const param", needs="8.0 sm_90",
        instead="nothing: no tensor maps", **common)
    row("applypriority", "applypriority{.global}.L2::evict_normal", "m: i:", "hint", needs="7.4 sm_80", **common)
    row("discard", "discard{.global}.L2", "m: i:", "hint", needs="7.4 sm_80", **common)
    row("createpolicy", "createpolicy.fractional.policy{.second}.b64", "w:b64 r:f32?", "policy",
        policy="L2::evict_last L2::evict_normal L2::evict_first L2::evict_unchanged",
        second="L2::evict_first L2::evict_unchanged", needs="7.4 sm_80", **common)


def _atomics() -> None:
    kinds: tuple[tuple[str, str, str, str], ...] = (
        ("bits", "and or xor", "b32 b64", ""), ("exch", "exch", "b32 b64", ""), ("inc", "inc dec", "u32", ""),
        ("add", "add", "u32 s32 u64 f32 f64", ""), ("min", "min max", "u32 s32 u64 s64", ""),
        ("half", "add", "f16 f16x2 bf16 bf16x2", ".noftz"))
    for kind, op, type, noftz in kinds:
        common: dict[str, Any] = {
            "sem": "relaxed acquire release acq_rel", "scope": _SCOPES, "space": f"global {_ANY_SHARED}", "op": op,
            "type": type, "instead": {**_NO_CLUSTER, "bf16": "atom.cas in a loop", "bf16x2": "atom.cas in a loop"},
            "needs": {**_CLUSTER, "bf16": "7.8 sm_90", "bf16x2": "7.8 sm_90"}}
        row(f"atom.{kind}", f"atom{{.sem}}{{.scope}}{{.space}}.op{noftz}{{.L2::cache_hint}}.type",
            "w:type m: r:type r:b64?", "atomic", **common)
        if kind != "exch":
            common = {**common, "sem": "relaxed release"}
            row(f"red.{kind}", f"red{{.sem}}{{.scope}}{{.space}}.op{noftz}{{.L2::cache_hint}}.type", "m: r:type r:b64?",
                "atomic", **common)
    row("atom.cas", "atom{.sem}{.scope}{.space}.cas.type", "w:type m: r:type r:type", "atomic",
        sem="relaxed acquire release acq_rel", scope=_SCOPES, space=f"global {_ANY_SHARED}", type="b32 b64",
        needs=_CLUSTER, instead=_NO_CLUSTER)
    row("atom.cas.b16", "atom{.sem}{.scope}{.space}.cas.b16", "w:b16 m: r:b16 r:b16", "atomic",
        sem="relaxed acquire release acq_rel", scope=_SCOPES, space=f"global {_ANY_SHARED}", needs=_CLUSTER,
        instead=_NO_CLUSTER)
    for name, operands in (("atom", "w:type*vec m: r:type*vec r:b64?"), ("red", "m: r:type*vec r:b64?")):
        sems = "relaxed acquire release acq_rel" if name == "atom" else "relaxed release"
        row(f"{name}.vector", f"{name}{{.sem}}{{.scope}}{{.global}}.add{{.L2::cache_hint}}.vec.type", operands,
            "atomic", sem=sems, scope=_SCOPES, vec="v2 v4", type="f32", needs="8.1 sm_90",
            instead=f"{name}.add.f32 of each")
        row(f"{name}.vector.half", f"{name}{{.sem}}{{.scope}}{{.global}}.op.noftz{{.L2::cache_hint}}.vec.type",
            operands, "atomic", sem=sems, scope=_SCOPES, op="add min max", vec="v2 v4 v8", type="f16 f16x2 bf16 bf16x2",
            needs="8.1 sm_90", instead=f"{name}.add.noftz.f16x2 of each")


def _others() -> None:
    row("mapa", "mapa.shared::cluster.type", "w:type r:type r:u32", "cluster", type="u32 u64", needs="7.8 sm_90",
        instead="global memory", section=_MOVE)
    row("mapa.generic", "mapa.u64", "w:u64 r:u64 r:u32", "cluster", needs="7.8 sm_90", instead="global memory",
        section=_MOVE)
    row("getctarank", "getctarank.shared::cluster.type", "w:u32 r:type", "cluster", type="u32 u64", needs="7.8 sm_90",
        instead="%ctaid", section=_MOVE)
    row("griddepcontrol", "griddepcontrol.action", "", "hint", action="launch_dependents wait", needs="7.8 sm_90",
        instead="an ordinary launch")
    row("nanosleep", "nanosleep.u32", "r:u32", "hint", section="Miscellaneous Instructions")
    row("pmevent", "pmevent", "i:", "hint", section="Miscellaneous Instructions")


_barriers()
_mbarriers()
_asynchronous()
_atomics()
_others()
