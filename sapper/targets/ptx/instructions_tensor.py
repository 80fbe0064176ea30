from typing import Any
from .rows import Row, make_row
ROWS: list[Row] = []
def row(name: str, syntax: str, operands: str, **more: Any) -> None:
    ROWS.append(make_row(name, syntax, operands, None, unit="tcgen05", section="x", needs="8.6 sm_100a", **more))
row("tcgen05.alloc", "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32", "m: r:u32")
row("tcgen05.rel", "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", "")
row("tcgen05.dealloc", "tcgen05.dealloc.cta_group::1.sync.aligned.b32", "r:b32 r:u32")
for k in ("f16","f8f6f4"): row("tcgen05.mma"+k, "tcgen05.mma.cta_group::1.kind::"+k, "m: r:b64^m: r:b64 r:b32 r:pred")
row("tcgen05.commit", "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64", "m:")
row("tcgen05.commit.m", "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64", "m: r:u16")
for n in (1,2,4,8,16,32):
    row(f"tcgen05.ld{n}", f"tcgen05.ld.sync.aligned.16x256b.x{n}.b32", f"w:b32*{4*n} m:")
row("tcgen05.wait", "tcgen05.wait::ld.sync.aligned", "")
row("tcgen05.fa", "tcgen05.fence::after_thread_sync", "")
row("tcgen05.fb", "tcgen05.fence::before_thread_sync", "")
for n in (1,2,4,8,16,32,64):
    row(f"tcgen05.st{n}", f"tcgen05.st.sync.aligned.16x128b.x{n}.b32", f"m: r:b32*{2*n}")
row("tcgen05.waitst", "tcgen05.wait::st.sync.aligned", "")
