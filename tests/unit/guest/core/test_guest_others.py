"""What something else does to CPUs and blocks."""

from one import BLOCK, SETTINGS, One, grant, of, ops, reclaim, said

from guestd.guest.core.actions import Log
from guestd.guest.core.ops import BlockOp, BlockTarget, CpuOp
from guestd.model.messages import Ack, AckStatus, Demand, RefusalReason
from guestd.model.resources import Kind


def test_a_cpu_that_a_person_took_offline_is_left_alone_and_said() -> None:
    one = One(cpus=3)
    one.welcome()
    one.order(grant(Kind.CPU, 3000))
    one.cpus.discard(2)
    actions = one.step(SETTINGS.reconcile_seconds)
    assert ops(actions) == []
    demand = said(Demand, actions)[-1]
    assert "CPU 2 taken offline by something else, left alone" in [reason.text for reason in demand.reasons]
    assert one.machine.counters["taken-by-others"] == 1
    [ack] = said(Ack, one.order(grant(Kind.CPU, 3000, 2, 2)))
    assert (ack.status, ack.refusal, ack.achieved) == (AckStatus.PARTIAL, RefusalReason.OTHERS, 2000)
    assert ops(one.step(60.0)) == []
    assert one.machine.counters["taken-by-others"] == 1, "said once"


def test_when_it_is_back_it_counts_again() -> None:
    one = One(cpus=3)
    one.welcome()
    one.order(grant(Kind.CPU, 3000))
    one.cpus.discard(2)
    one.step(SETTINGS.reconcile_seconds)
    one.cpus.add(2)
    demand = said(Demand, one.step(SETTINGS.reconcile_seconds))[-1]
    assert all(reason.code != "others" for reason in demand.reasons)
    [ack] = said(Ack, one.order(grant(Kind.CPU, 3000, 2, 2)))
    assert ack.status is AckStatus.DONE


def test_what_we_switched_ourselves_is_nobody_elses() -> None:
    one = One(cpus=3)
    one.welcome()
    one.order(grant(Kind.CPU, 3000))
    one.order(reclaim(Kind.CPU, 2000, 2, 2))
    one.result(CpuOp(2, False))
    actions = one.order(grant(Kind.CPU, 3000, 3, 3))
    assert ops(actions) == [CpuOp(2, True)]
    assert one.machine.counters["taken-by-others"] == 0


def test_a_block_that_others_took_offline_is_left_alone() -> None:
    one = One(blocks=6)
    one.welcome()
    one.order(grant(Kind.MEMORY, 6 * BLOCK))
    one.blocks.discard(5)
    actions = one.step(SETTINGS.reconcile_seconds)
    assert BlockOp(5, BlockTarget.ONLINE_MOVABLE) not in ops(actions)
    assert any("memory block 5 taken offline by something else" in log.text for log in of(Log, actions))


def test_what_others_bring_online_is_simply_counted() -> None:
    one = One(cpus=1)
    one.welcome()
    one.cpus.add(1)
    one.step(SETTINGS.reconcile_seconds)
    [ack] = said(Ack, one.order(grant(Kind.CPU, 2000)))
    assert (ack.status, ack.achieved) == (AckStatus.DONE, 2000)


def test_what_a_person_took_offline_is_left_alone_after_a_restart_too() -> None:
    before = One(cpus=4)
    before.welcome()
    before.order(grant(Kind.CPU, 4000))
    before.cpus.discard(3)
    before.step(SETTINGS.reconcile_seconds)
    assert before.machine.held == {(CpuOp, 3)}
    one = One(cpus=2, held=before.machine.held)
    one.welcome()
    actions = one.order(grant(Kind.CPU, 4000))
    assert ops(actions) == [CpuOp(2, True)]
    [ack] = said(Ack, one.result(CpuOp(2, True)))
    assert (ack.status, ack.refusal) == (AckStatus.PARTIAL, RefusalReason.OTHERS)
    one.cpus.add(3)
    one.step(SETTINGS.reconcile_seconds)
    assert one.machine.held == frozenset()
