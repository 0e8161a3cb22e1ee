"""`hominem data`: prompts, candidate replies, labels, and the datasets made of them."""

from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import click

from hominem_mlx.cli.session import InOrder, Session, shares

if TYPE_CHECKING:
    from hominem_mlx.data.again import Again
    from hominem_mlx.data.comparing import Compared
    from hominem_mlx.data.rater import Rated
    from hominem_mlx.data.teacher import Cost
    from hominem_mlx.data.unnamed import Axis
    from hominem_mlx.schema import Teacher

KINDS = ("prompts", "trajectories", "labels", "preferences", "thumbs", "memory", "recall", "fixtures")
NO_LABELS = "there are no labels in the home yet: `hominem data import --starter`, or `hominem data rate`"
LOCAL = ("localhost", "127.0.0.1", "::1")
YES = click.option("--yes", is_flag=True, help="Agree beforehand to what the estimate says.")
BATCH = click.option("--batch", is_flag=True, help="At half the price, within a day: Anthropic's message batches.")
MAX_COST = click.option("--max-cost", metavar="USD", type=click.FloatRange(0), help="Send nothing if it may cost more.")


@click.group(cls=InOrder)
def data() -> None:
    """Prompts, candidate replies, labels, and the datasets made of them.

    In order: generate, sample, rate, verify, split, pair. Rows of your own come in by import and win over a teacher's.
    """


@data.command()
@shares()
def generate(session: Session) -> None:
    """Make prompts from the bundled scenarios: varied, made harder, with conflicts in them.

    How many, and from which seed: data.prompts, data.seed. The same seed adds the same prompts once.
    """
    from hominem_mlx.data.prompts import generate as generate_prompts

    made = generate_prompts(session.home, session.config)
    session.console.result([prompt.model_dump(mode="json") for prompt in made])
    session.console.table(["id", "difficulty", "prompt"], [[p.id, p.difficulty, p.prompt] for p in made])
    seed = session.config.data.seed
    session.console.say(f"{len(made)} prompts of seed {seed} are in the home. Next: hominem data sample")


@data.command()
@click.option("--starter", is_flag=True, help="Also for the bundled prompts that are in the home.")
@click.option("--edits", is_flag=True, help="Copies of the replies there are, worse in one dimension only.")
@click.option(
    "--self-play",
    metavar="N",
    type=click.IntRange(1),
    help="No teacher: the student answers, and the N answers two judges differ on most are kept.",
)
@BATCH
@YES
@MAX_COST
@shares()
def sample(
    session: Session,
    starter: bool,
    edits: bool,
    self_play: int | None,
    batch: bool,
    yes: bool,
    max_cost: float | None,
) -> None:
    """Ask the teacher, and the student itself, for candidate replies: good, bad and ambiguous ones.

    For your own prompts, imported or generated: data.candidates each, data.student_candidates of them by the student.
    What is there already stays.
    """
    if edits and self_play:
        raise click.UsageError("--edits needs a teacher, --self-play has none: give one of them")
    if self_play:
        _self_play(session, self_play, starter)
        return
    from hominem_mlx.data import edits as editing
    from hominem_mlx.data import sampler
    from hominem_mlx.data.teacher import open_teacher

    _limit(session, max_cost, batch)
    config, home = session.config, session.home
    teacher = open_teacher(config, home)
    if edits:
        _agree(session, teacher, editing.cost(home, config, teacher), "prompts and replies", yes)
        with session.console.progress() as report:
            made = editing.edit(home, config, teacher, progress=report)
        session.console.result(made.model_dump(mode="json"))
        session.console.say(f"{made.made} contrast edits by {teacher.name}, {made.kept} were there already.")
        _show_failures(session, "without an edit", made.failed)
        session.console.say("Next: hominem data rate")
        return
    student = session.generator if config.data.student_candidates else None
    cost = sampler.cost(home, config, teacher, student=student, starter=starter)
    _agree(session, teacher, cost, "prompts", yes)
    with session.console.progress() as report:
        done = sampler.sample(home, config, teacher, student=student, starter=starter, progress=report)
    session.console.result(done.model_dump(mode="json"))
    session.console.say(
        f"{done.teacher} replies by {teacher.name}, {done.student} by the student, {done.kept} were there already."
    )
    _show_failures(session, "without a reply", done.failed)
    session.console.say("Next: hominem data rate")


@data.command()
@click.option("--retest", "task", flag_value="retest", help="Ask anew about a tenth of its labels: how sure are they?")
@click.option("--second", "task", flag_value="second", help="Add its opinion to replies another teacher has labelled.")
@click.option("--compare", "task", flag_value="compare", help="Compare replies side by side; makes preference pairs.")
@click.option("--own", "task", flag_value="own", help="Add numbers in dimensions of your own to labels that lack them.")
@click.option(
    "--select",
    metavar="N",
    type=click.IntRange(1),
    help="Only the N replies to learn most from: doubtful, unlike labelled ones, or in rare corners.",
)
@BATCH
@YES
@MAX_COST
@shares()
def rate(
    session: Session, task: str | None, select: int | None, batch: bool, yes: bool, max_cost: float | None
) -> None:
    """Ask the teacher for seven dimensions, intensity, safety and a reason for every reply without a label.

    Every answer is stored as it arrives: a stopped run goes on where it was and pays for nothing twice. Before anything
    leaves this machine the cost is estimated and you are asked. The wait for a --batch may be ended with Ctrl-C; the
    same command goes on waiting.

    Labels by several teachers become one, each weighed by how well it agrees with itself (--retest of each, then
    --second). `hominem data stats` shows these reliabilities.
    """
    if task and select:
        raise click.UsageError(f"--select chooses among replies without a label, --{task} is about others: give one")
    from hominem_mlx.data import again, comparing, own, rater
    from hominem_mlx.data.teacher import open_teacher

    _limit(session, max_cost, batch)
    config, home = session.config, session.home
    teacher = open_teacher(config, home)
    only = _select(session, select) if select else None
    if task is None:
        cost = rater.cost(home, config, teacher, only=only)
    else:
        costs = {
            "retest": again.retest_cost, "second": again.second_cost, "compare": comparing.cost, "own": own.cost
        }  # fmt: skip
        cost = costs[task](home, config, teacher)
    _agree(session, teacher, cost, "prompts and replies", yes)
    with session.console.progress() as report:
        if task == "compare":
            _show_compared(session, comparing.compare(home, config, teacher, progress=report))
        elif task is not None:
            ask = {"retest": again.retest, "second": again.second, "own": own.fill}[task]
            _show_again(session, teacher, task, ask(home, config, teacher, progress=report))
        else:
            _show_rated(session, teacher, rater.rate(home, config, teacher, only=only, progress=report))


@data.command()
@click.option("--drop", is_flag=True, help="Take out the rows that the findings name for it.")
@shares()
def verify(session: Session, drop: bool) -> None:
    """Look for labels that contradict, repeat or leak, for halo, and for edits that change too much.

    Exit code 1 when something is found. --drop takes rows out of the labels only; teachers' answers stay stored.
    """
    from hominem_mlx.data.verifier import verify_home
    from hominem_mlx.errors import InputError, NotGoodEnough

    manifold = session.config.manifold.in_use
    verdict = verify_home(session.home, drop=drop, manifold=manifold)
    if not verdict.rows:
        raise InputError(NO_LABELS)
    gone = sorted({name for problem in verdict.problems for name in problem.drop}) if drop else []
    if drop:
        verdict = verify_home(session.home, manifold=manifold)
    session.console.result({**verdict.model_dump(mode="json"), "is_good": verdict.is_good, "dropped": gone})
    session.console.table(["measured over all labels", ""], [[name, value] for name, value in verdict.measures.items()])
    session.console.table(["rule", "finding"], [[problem.rule, problem.text] for problem in verdict.problems])
    if gone:
        session.console.say(f"{len(gone)} rows were taken out: {', '.join(gone)}")
    if not verdict.is_good:
        can_drop = any(problem.drop for problem in verdict.problems)
        way_out = "mend the rows, or take them out with --drop" if can_drop else "mend or relabel the rows named above"
        raise NotGoodEnough(f"{len(verdict.problems)} findings in {verdict.rows} labels: {way_out}")
    session.console.say(f"{verdict.rows} labels, nothing found. Next: hominem data split")


@data.command()
@click.option("-n", "count", type=click.IntRange(1), default=5, show_default=True, help="How many rows.")
@click.option("--seed", type=int, default=0, show_default=True, help="Equal seeds show equal rows.")
@shares()
def view(session: Session, count: int, seed: int) -> None:
    """Show random labelled replies with their numbers, to read with your own eyes."""
    from hominem_mlx.data import home as homes
    from hominem_mlx.data.verifier import sample_rows
    from hominem_mlx.records import Label

    rows = sample_rows(homes.read(session.home, Label), count, seed=seed)
    session.console.result([row.model_dump(mode="json") for row in rows])
    if not rows:
        session.console.say(NO_LABELS)
    for row in rows:
        numbers = row.reward.model_dump(exclude_none=True)
        session.console.say(f"{row.id}  {row.category}, rated by {row.labeller}")
        session.console.say(f"  said    {row.prompt}")
        session.console.say(f"  reply   {row.response}")
        session.console.say("  " + "  ".join(f"{name} {value:+.2f}" for name, value in numbers.items()))
        session.console.say(f"  why     {row.rationale}\n" if row.rationale else "")


@data.command()
@shares()
def split(session: Session) -> None:
    """Pin the rows of the home as artifacts, split by prompt: what is learnt from, and what is only for examination."""
    from hominem_mlx.data.dataset import split as split_rows

    made = split_rows(session.registry, session.home, session.config)
    session.console.result({name: {"artifact": each.ref, **each.metadata["metrics"]} for name, each in made.items()})
    rows = [[n, a.ref, ", ".join(f"{v} {k}" for k, v in a.metadata["metrics"].items())] for n, a in made.items()]
    session.console.table(["", "artifact", "rows"], rows)
    left_out = made["suite"].metadata["notes"].get("left_out", [])
    if left_out:
        session.console.say(f"{len(left_out)} held-out rows repeat something learnt and were left out.")
    attacks = made["raw"].metadata["notes"].get("left_out", [])
    if attacks:
        session.console.say(
            f"{len(attacks)} rows attack a model or its judge. Nothing learns from them; they stay here:"
        )
        session.console.table(["row", "why"], [[row["id"], row["reason"]] for row in attacks])
    session.console.say("Next: hominem train reward, or hominem data pair")


@data.command()
@shares()
def pair(session: Session) -> None:
    """Make preference pairs from the labels: margins, soft targets, intensity, safety.

    With pairs.on_policy above 0 the student also answers the training prompts, and the reward model pairs its answers.
    """
    from hominem_mlx.data.preferences import pair as make_pairs

    labels = session.current("dataset", "hominem data split", pointer="labels")
    on_policy = session.config.pairs.on_policy > 0
    with session.console.progress() as report:
        made = make_pairs(
            session.registry,
            labels,
            session.config,
            scorer=session.reward_model() if on_policy else None,
            generator=session.generator if on_policy else None,
            reward_model=session.reward_artifact() if on_policy else None,
            progress=report,
        )
    metrics = made.metadata["metrics"]
    session.console.result({"artifact": made.ref, **metrics})
    thumbs = f", {metrics['thumbs']} single thumbs" if "thumbs" in metrics else ""
    session.console.say(
        f"{made.ref}: {metrics['train']} pairs to learn from, {metrics['valid']} to watch, {metrics['memory']} memories"
        f"{thumbs}. Next: hominem train dual"
    )
    if untrusted := metrics.get("untrusted_answers"):
        session.console.say(
            f"Left out: {untrusted} answers of the student's that are unlike all that the reward model was trained on, "
            "or hold an injection. Label answers of its own (data.student_candidates), or set pairs.on_policy_strange."
        )
    if without := metrics.get("compared_without_label"):
        session.console.say(
            f"Left out: {without} compared pairs with a reply that has no label, so nothing says whether it is safe: "
            "`hominem data rate`, then split and pair again."
        )


@data.command()
@shares()
def stats(session: Session) -> None:
    """Count rows and labellers, show how every number is distributed and how reliable it is; then the halo gate.

    Where the reasons raters give keep speaking of something that no number holds, it says so, with the replies at both
    ends: perhaps a dimension of your own (docs/REWARD_MANIFOLD.md).

    Exit code 1 when the labels are one impression under several names (fewer than 2.5 independent directions of 7, or
    a mean correlation above 0.7) or a dimension is the same everywhere: then nothing should be trained on them.
    """
    from collections import Counter

    from hominem_mlx.data import again, agreement
    from hominem_mlx.data import home as homes
    from hominem_mlx.data.unnamed import unnamed_axis
    from hominem_mlx.data.verifier import attacks, halo
    from hominem_mlx.data.verifier import stats as distributions
    from hominem_mlx.errors import NotGoodEnough
    from hominem_mlx.records import Label

    counts = {Path(file).name: len(homes.read(session.home, model)) for model, file in homes.FILES.items()}
    manifold = session.config.manifold.in_use
    labels = homes.read(session.home, Label, manifold)
    labellers = dict(Counter(label.labeller for label in labels).most_common())
    found = [stat.model_dump(mode="json") for stat in distributions(labels, manifold)]
    retests = homes.read_aside(session.home, homes.RETESTS)
    reliable = [r.model_dump() for r in agreement.reliabilities(again.first_ratings(session.home), retests)]
    attacked = attacks(labels)
    gate, axis = halo(labels, manifold), unnamed_axis(labels, manifold)
    session.console.result(
        {
            "rows": counts,
            "labellers": labellers,
            "numbers": found,
            "reliability": reliable,
            "attacks": attacked,
            "halo": {**gate.model_dump(), "is_good": gate.is_good},
            "unnamed": {**axis.model_dump(), "is_strong": axis.is_strong},
        }
    )
    session.console.table(["file", "rows"], list(counts.items()))
    if not labels:
        return
    session.console.say()
    session.console.table(["labelled by", "rows"], list(labellers.items()))
    session.console.say()
    columns = ["category", "number", "rows", "mean", "sd", "low", "high"]
    session.console.table(columns, [list(stat.values()) for stat in found])
    if any(attacked.values()):
        session.console.say()
        session.console.table(["attacks on a model or its judge", "how many"], list(attacked.items()))
    if reliable:
        session.console.say()
        columns = ["asked twice", "number", "rows", "reliability", "highest correlation to reach"]
        session.console.table(columns, [list(item.values()) for item in reliable])
    session.console.say()
    if gate.participation_ratio is not None:
        session.console.say(
            f"Halo: {gate.participation_ratio:.2f} independent directions of {len(gate.dimensions)} (at least "
            f"{gate.wanted:g} wanted), mean correlation {gate.mean_abs_correlation:.2f} (at most 0.7)."
        )
    for note in [*gate.notes, *([axis.note] if axis.note else [])]:
        session.console.say(f"Note: {note}.")
    _show_unnamed(session, axis)
    if not gate.is_good:
        raise NotGoodEnough("; ".join(gate.faults))


@data.command("import")
@click.argument("file", type=click.Path(dir_okay=False), required=False)
@click.option("--starter", is_flag=True, help="The bundled corpus in place of a file.")
@click.option("--kind", type=click.Choice(KINDS), help="What all rows are; else each row's keys tell.")
@click.option(
    "--human", is_flag=True, help="Labels that do not say who rated them are yours: they win over a teacher's."
)
@shares(config=False)
def import_(session: Session, file: str | None, starter: bool, kind: str | None, human: bool) -> None:
    """Bring in a file of prompts, labels, memories, preferences, thumbs, questions or fixtures.

    FILE is JSONL, an export of Open WebUI (.json: what you rated there), or a list of prompts (.txt, one a line). It is
    taken wholly or not at all; docs/FORMATS.md shows a row of each kind.
    """
    from collections import Counter

    from hominem_mlx.data.dataset import import_file, import_starter

    if (file is None) != starter:
        raise click.UsageError("name a FILE, or say --starter")
    left_out: Counter[str] = Counter()
    if file is None:
        counts = import_starter(session.home)
    else:
        labeller = "human" if human else None
        manifold = session.config.manifold.in_use
        counts = import_file(session.home, Path(file), kind, labeller=labeller, left_out=left_out, manifold=manifold)
    session.console.result({**counts, "left_out": dict(left_out)} if left_out else counts)
    session.console.table(
        ["rows", "added", "replaced", "kept as they were"],
        [[name, count["added"], count["replaced"], count["kept"]] for name, count in counts.items()],
    )
    for reason, count in left_out.items():
        session.console.say(f"Left out: {count} {reason}.")


def _select(session: Session, count: int) -> list[str]:
    """Ids of the candidates from which the reward model in use would learn most, shown with the reasons."""
    from hominem_mlx.data import rater, selection
    from hominem_mlx.data.verifier import matrix

    todo, labels, _ = rater.unrated(session.home)
    if not todo:
        return []
    model = session.reward_model()
    replies, known = ([(row.prompt, row.response) for row in rows] for rows in (todo, labels))
    with session.console.progress() as report:
        features = model.read(replies + known, session.home, report)
    picks = selection.select(
        count,
        model.score_many(replies),
        features[: len(todo)],
        matrix(labels, model.manifold),
        features[len(todo) :],
    )
    session.console.table(
        ["to label", "doubt", "unlike others by", "rarity"],
        [[todo[pick.candidate].id, pick.doubt, pick.novelty, pick.rarity] for pick in picks],
    )
    return [todo[pick.candidate].id for pick in picks]


def _self_play(session: Session, count: int, starter: bool) -> None:
    from hominem_mlx.data.dataset import read_labels
    from hominem_mlx.data.selfplay import play
    from hominem_mlx.reward.train import fit_audit

    student = session.generator
    lm = session.__dict__.get("base")
    model = session.reward_model()
    labels = read_labels(session.current("dataset", "hominem data split", pointer="labels"), "valid")
    audit = fit_audit(labels, session.config, judge=model, home=session.home, lm=lm)
    with session.console.progress() as report:
        done = play(session.home, session.config, student, (model, audit), count, starter=starter, progress=report)
    session.console.result(done.model_dump(mode="json"))
    session.console.say(f"{done.added} of {done.answers} answers by the student became candidates to label.")
    if done.mean_disagreement is not None and done.least_kept is not None:
        session.console.say(
            f"On them the reward model and an audit judge differ by {done.least_kept:.2f} standard deviations or more; "
            f"on all by {done.mean_disagreement:.2f} in the mean."
        )
    session.console.say("Next: hominem data rate")


def _show_rated(session: Session, teacher: "Teacher", done: "Rated") -> None:
    session.console.result(done.model_dump(mode="json"))
    session.console.say(f"{done.rated} replies labelled by {teacher.name}, {done.kept} had a label already.")
    if done.injected:
        session.console.say(f"{len(done.injected)} replies speak to their judge. They were judged without that:")
        session.console.table(["reply", "it"], [[name, "; ".join(why)] for name, why in done.injected.items()])
    _show_failures(session, "without a label; the next run asks again", done.unlabelled)
    session.console.say("Next: hominem data verify")


def _show_again(session: Session, teacher: "Teacher", task: str, done: "Again") -> None:
    session.console.result(done.model_dump(mode="json"))
    what = {
        "retest": "rated a second time", "second": "rated beside another teacher", "own": "rated in your own dimensions"
    }[task]  # fmt: skip
    session.console.say(f"{done.rated} replies {what} by {teacher.name}, {done.kept} had been before.")
    _show_failures(session, "without an answer; the next run asks again", done.unanswered)
    if done.unknown:
        names = ", ".join(done.unknown)
        session.console.say(
            f"How reliable {names} is, is not known: all count alike until `data rate --retest` with it."
        )
    session.console.say("Next: hominem data stats")


def _show_compared(session: Session, done: "Compared") -> None:
    session.console.result(done.model_dump(mode="json"))
    session.console.say(f"{done.pairs} preference pairs added; {done.undecided} pairs were judged alike.")
    if done.consistent is not None:
        session.console.say(
            f"{done.consistent:.0%} of the pairs got the same verdict in both orders; the reply shown first was "
            f"favoured by {done.position_bias:+.2f}."
        )
    _show_failures(session, "pairs without an answer; the next run asks again", done.unanswered)
    session.console.say("Next: hominem data split")


def _show_unnamed(session: Session, axis: "Axis") -> None:
    """What the rationales hold beside the labels, with the replies at both ends."""
    if axis.agreement is None:
        return
    if not axis.is_strong:
        session.console.say(
            f"Nothing found that no dimension names: the strongest axis left in {axis.rows} rationales is not the same "
            f"in both halves of the prompts (agreement {axis.agreement:.2f} of 1), or no stronger than chance."
        )
        return
    session.console.say(
        f"Something that no dimension names: {axis.share:.1%} of what the labels leave unexplained in {axis.rows} "
        f"rationales lies on one axis (by chance {axis.by_chance:.1%}, p = {axis.p:.3f})."
    )
    if axis.pull is not None:
        session.console.say(f"It goes with the scalar beyond the dimensions: r = {axis.pull:+.2f}.")
    for name, said, rows in zip(("one end", "the other"), axis.words, axis.ends, strict=True):
        session.console.say(f"  {name}: {', '.join(said)}")
        for row in rows:
            session.console.say(f"    {row.id}  {shorten(row.response, 80)}")
            session.console.say(f"      why: {shorten(row.rationale, 120)}")
    session.console.say("Is it a value of yours? docs/REWARD_MANIFOLD.md: A dimension of your own.")


def _limit(session: Session, max_cost: float | None, batch: bool) -> None:
    if max_cost is not None:
        session.override(f"teacher.max_cost_usd={max_cost}")
    if batch:
        session.override("teacher.batch=true")


def _agree(session: Session, teacher: "Teacher", cost: "Cost", what: str, yes: bool) -> None:
    """Refuse what is too dear; else say what a teacher behind HTTP will be sent, and ask before anything leaves."""
    from urllib.parse import urlsplit

    from hominem_mlx.data.teacher import refuse_if_dear
    from hominem_mlx.data.wire import CLOUD

    settings = session.config.teacher
    if settings.kind != "anthropic":
        return
    if cost.under_way:
        session.console.note(f"{cost.under_way} answers are under way in batches sent before: they are waited for.")
    if settings.batch and (cost.under_way or cost.requests):
        session.console.note("A batch takes up to 24 hours. Ctrl-C ends the waiting only: the same command goes on.")
    if not cost.requests:
        return
    refuse_if_dear(teacher, cost)
    host = urlsplit(settings.base_url or CLOUD).hostname
    unknown = "price not known: set teacher.usd_per_million_input and _output"
    price = unknown if cost.usd is None else f"at most {cost.usd:.2f} USD"
    if settings.batch:
        price += ", the half price of a batch" * (cost.usd is not None)
    session.console.note(
        f"{cost.requests} requests to {settings.model} at {host} ({cost.stored} more are answered already): "
        f"{cost.input_tokens:,} tokens in, at most {cost.output_tokens:,} out, {price}."
    )
    if host in LOCAL:
        return
    session.console.note(f"The {what} of {session.home / 'data'} leave this machine.")
    if not session.ask("Send them?", yes=yes):
        session.console.note("Nothing was sent.")
        raise click.exceptions.Exit(130)


def _show_failures(session: Session, what: str, failed: dict[str, str]) -> None:
    """How many items stay open, and each distinct reason once."""
    if not failed:
        return
    reasons: dict[str, int] = {}
    for reason in failed.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    session.console.say(f"{len(failed)} are {what}:")
    session.console.table(["how many", "why"], [[count, reason] for reason, count in reasons.items()])
