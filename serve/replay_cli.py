"""`hone replay ...`: look into the replay buffer and the ledger of a run; nothing changes.

Invariant: the answers are those of `serve.replay_queries`, which the admin API gives, too.
"""

from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Look into a run's replay buffer and ledger. `stats` and `show` need a living run.",
    no_args_is_help=True,
)
Run = Annotated[str, typer.Argument(metavar="RUN", help="A name under runs/ or a path.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def stats(run: Run, as_json: AsJson = False) -> None:
    """How many groups are ready, leased and consumed, and what became of the others."""
    from cluster.run_dir import RunDir
    from serve import replay_queries

    counts = replay_queries.stats(RunDir.open(run))
    if as_json:
        _print_json(counts)
        return
    print(f"ready {counts.ready}  leased {counts.leased}  consumed {counts.consumed}")
    print(f"added {counts.added}  acknowledged {counts.acknowledged}  ", end="")
    print(f"duplicates {counts.duplicates}  dead letters {counts.dead_lettered}")
    dropped = "  ".join(f"{reason} {n}" for reason, n in sorted(counts.dropped.items()))
    print(f"dropped: {dropped or 'none'}")
    print(f"payloads {counts.payload_bytes / 2**20:.1f} MiB, unaccounted {counts.num_unaccounted}")


@app.command()
def show(
    run: Run, group: Annotated[str, typer.Argument(metavar="GROUP")], as_json: AsJson = False
) -> None:
    """One group that the buffer holds: its task, completions and verdicts."""
    from cluster.run_dir import RunDir
    from serve import replay_queries

    facts = replay_queries.show(RunDir.open(run), group)
    _print_json(facts) if as_json else _print_group(facts)


@app.command()
def why(
    run: Run,
    step: Annotated[int, typer.Option(min=0, help="Optimizer step.")],
    as_json: AsJson = False,
) -> None:
    """Which groups, versions and verdicts moved the weights at a step."""
    from cluster.run_dir import RunDir
    from serve import replay_queries

    answer = replay_queries.why(RunDir.open(run), step)
    if as_json:
        _print_json(answer)
        return
    record = answer.record
    signals = "  ".join(f"{n} {','.join(v)}" for n, v in record.reward_versions.items())
    print(f"step {record.step} made policy version {record.policy_version}: ", end="")
    print(f"{len(record.group_ids)} groups, {record.num_loss_tokens} loss tokens")
    print(f"sampled with versions {min(record.policy_versions, default=0)} ", end="")
    print(f"to {max(record.policy_versions, default=0)}; rewards {signals or 'none'}")
    for facts in answer.groups:
        print()
        _print_group(facts)
    if answer.num_gone:
        print(f"\n{answer.num_gone} groups are no longer in the buffer; ids in the ledger")


def _print_group(facts: Any) -> None:
    from cluster.log import escape

    print(f"group {facts.group_id}  task {facts.task_id}  hints {facts.num_hints}")
    print(f"  prompt: {escape(facts.prompt)[:300]}")
    print(f"  reference: {escape(facts.reference)[:200]}")
    for trajectory in facts.trajectories:
        reward = "abstained" if trajectory.reward is None else f"{trajectory.reward:.3f}"
        versions = ",".join(map(str, trajectory.policy_versions))
        print(f"  {reward:>9}  v{versions}  {trajectory.num_tokens} tokens  ", end="")
        print(f"{trajectory.status}  {escape(trajectory.text)[:120]}")
        for verdict in trajectory.verdicts:
            score = "abstained" if verdict.score is None else f"{verdict.score:.3f}"
            words = escape(verdict.error or verdict.evidence)[:120]
            print(f"             {verdict.name} {score} ({verdict.reward_version}) {words}")


def _print_json(value: object) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value)).decode())
