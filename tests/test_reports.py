"""Reports: every line of a file is doubted, nothing in it becomes markup, all of it is told."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rankwise import data, reports
from rankwise.cli import main
from rankwise.cli.parser import parse
from rankwise.errors import CheckpointError, OptionError
from rankwise.reports import figures, plots, style, svg, words
from rankwise.reports.history import LONGEST_LINE, printable
from rankwise.reports.layers import sparkline
from test_training import planted

STEPS = 100  # of an epoch
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\x1b[31m\u202e]]>--></style>"
)


def entry(name: str, rank: int | None, reason: str = "") -> dict:
    dense, low = 128 * 256, (rank or 0) * (128 + 256)
    return {
        "name": name,
        "kind": "Linear",
        "rows": 128,
        "columns": 256,
        "rank": rank,
        "reason": reason,
        "parameters": [dense, low or dense],
        "flops": None,
        "blocks": 1,
        "break_even": 86,
    }


def start(**recipe) -> dict:
    recipe = {
        "model": "net",
        "data": "set",
        "method": "cuttlefish",
        "seed": 0,
        "epochs": 4,
    } | recipe
    return {
        "event": "start",
        "recipe": recipe,
        "time": "2026-01-01T00:00:00+00:00",
        "method": "Cuttlefish()",
        "versions": {"python": "3.11"},
        "hardware": {"device": "cpu", "processor": "CPU", "threads": 1, "workers": 1},
        "data": {"name": "set", "task": "classification"},
    }


def epoch(number: int, **more) -> dict:
    return {
        "event": "epoch",
        "epoch": number,
        "step": number * STEPS,
        "loss": 2.0 / number,
        "validation_loss": 2.1 / number,
        "validation_accuracy": 1 - 0.5 / number,
        "lr": 0.1 / number,
        "step_ms": 10.0 if number < 3 else 6.0,
        "seconds": 5.0 * number,
    } | more


def finish(**more) -> dict:
    return {
        "event": "finish",
        "test_accuracy": 0.9,
        "test_loss": 0.3,
        "validation_accuracy": 0.91,
        "parameters": [40_000, 39_000],
        "dense_parameters": [100_000, 99_000],
        "flops": 1000,
        "dense_flops": 4000,
        "step_ms_dense": 10.0,
        "step_ms_low_rank": 6.0,
        "seconds": 20.0,
        "epochs": 4,
        "steps": 400,
        "task": "classification",
    } | more


def stable(when: float, **values: float) -> dict:
    return {"event": "stable ranks", "step": int(when * STEPS), "epoch": when, "values": values}


def cuttlefish() -> list[dict]:
    """A whole run: what it announces, measures, decides, switches to and shrinks."""
    wait = "once their stable ranks have settled"
    decided = [entry("first", None, "among the first 1"), entry("a", 40), entry("b", None, "slow")]
    shrunk = [decided[0], entry("a", 32), decided[2]]
    times = {"dense_ms": 3.0, "low_rank_ms": {"32": 1.0}}
    return [
        start(),
        {
            "event": "plan",
            "step": 0,
            "summary": f"2 of 3 layers to be decided: {wait}",
            "layers": [decided[0], entry("a", None, wait), entry("b", None, wait)],
        },
        {
            "event": "gains",
            "step": 0,
            "rows": [
                {"layer": "a", **times, "gain": 3.0, "kept": True, "reason": ""},
                {"layer": "b", **times, "gain": 0.75, "kept": False, "reason": "slow"},
            ],
        },
        stable(0.5, a=120.0, b=100.0),
        stable(1.0, a=60.0, b=90.0),
        epoch(1),
        stable(1.5, a=45.0, b=math.nan),
        stable(2.0, a=40.0, b=88.0),
        {
            "event": "settled",
            "step": 200,
            "epoch": 2.0,
            "layers": {"a": 1.5},
            "moving": {"b": 0.1},
            "reason": "enough have settled",
        },
        {
            "event": "switch",
            "step": 200,
            "method": "Cuttlefish",
            "layers": 1,
            "parameters": [100_000, 40_000],
            "loss_before": 0.5,
            "loss_after": 0.6,
            "loss_calibrated": 0.51,
            "moments": {"carried": 2, "fresh": 1},
            "seconds": 0.25,
            "lr_factor": 0.5,
        },
        epoch(2),
        {"event": "plan", "step": 200, "summary": "1 of 3 layers low-rank", "layers": decided},
        epoch(3),
        {
            "event": "ranks",
            "kind": "shrink",
            "step": 300,
            "layers": {"a": [40, 32]},
            "parameters": [40_000, 36_928],
            "energy": 0.991,
        },
        {"event": "plan", "step": 300, "summary": "1 of 3 low-rank, smaller", "layers": shrunk},
        epoch(4),
        finish(),
    ]  # fmt: skip


def write(folder: Path, records: list, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    (folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines) + tail)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return write(tmp_path / "run", cuttlefish())


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[1, 2]",
        "17",
        '{"step": 3}',
        '{"event": 4}',
        '{"event": "epoch"}',
        '{"event": "epoch", "epoch": "two"}',
        '{"event": "epoch", "epoch": true}',
        '{"event": "plan", "layers": 3}',
        '{"event": "stable ranks", "values": [1]}',
        '{"event": "resume"}',
        '{"event": "epoch", "epoch": 1' + "0" * 5000 + "}",
        "[" * 100_000,
        '{"event": "epoch", "epoch": 1, "loss": ' + "[" * 50_000,
        '{"event": "note", "text": "' + "x" * LONGEST_LINE + '"}',
    ],
    ids=lambda line: line[:40],
)
def test_a_line_that_is_no_record_is_left_out_and_counted(tmp_path, line):
    history = reports.read(write(tmp_path / "r", [start(), line, epoch(1)]))
    assert history.skipped == 1
    assert not history.torn
    assert [record["event"] for record in history.records] == ["start", "epoch"]
    assert "1 line left out" in " ".join(history.doubts)


def test_bytes_that_are_no_text_are_one_line_left_out(run):
    with (run / "records.jsonl").open("ab") as file:
        file.write(b'{"event": "epoch", \xff\xfe}\n')
    assert reports.read(run).skipped == 1


def test_a_torn_last_line_is_left_out_and_said(tmp_path):
    history = reports.read(write(tmp_path / "r", [start(), epoch(1)], tail='{"event": "epo'))
    assert history.torn
    assert history.skipped == 0
    assert len(history.records) == 2
    assert "the last line is unfinished" in history.doubts[0]


def test_a_whole_last_line_without_newline_counts(tmp_path):
    history = reports.read(write(tmp_path / "r", [start()], tail=json.dumps(epoch(1))))
    assert not history.torn
    assert len(history.epochs) == 1


def test_what_a_resumed_run_went_through_again_is_told_once(tmp_path):
    again = [epoch(2, loss=9.0), {"event": "resume", "step": STEPS}, epoch(2, loss=7.0)]
    history = reports.read(write(tmp_path / "r", [start(), epoch(1), *again]))
    assert history.curve("loss") == [(1.0, 2.0), (2.0, 7.0)]


@pytest.mark.parametrize(
    "number",
    ["NaN", "Infinity", "-Infinity", "1e999", '"1"', "null", "true", "[1]", "1" + "0" * 400],
)
def test_a_figure_that_is_no_number_never_ends_a_report(tmp_path, number):
    text = json.dumps(finish()).replace("0.9,", f"{number},")
    spoilt = json.dumps(epoch(1)).replace("2.1", number).replace("0.1", number)
    folder = write(tmp_path / "r", [start(), spoilt, epoch(2), text])
    assert main(["report", str(folder), "--html"]) == 0


@pytest.mark.parametrize("key", sorted({key for r in cuttlefish() for key in r} - {"event"}))
@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 1e300, [None, None], {"a": None}])
def test_any_value_anywhere_is_borne(tmp_path, key, value):
    spoilt = [r | {key: value} if key in r else r for r in cuttlefish()]
    write(tmp_path / "r", spoilt)
    try:
        history = reports.read(tmp_path / "r")
    except CheckpointError:
        pytest.fail("the other lines can be read")
    assert reports.page([history, history]).endswith("</html>\n")
    reports.decisions(history)


@pytest.mark.parametrize("missing", [*range(len(cuttlefish())), "epochs", "all but the epochs"])
def test_records_of_another_version_lack_lines(tmp_path, missing, capsys):
    records = cuttlefish()
    if isinstance(missing, int):
        del records[missing]
    else:
        records = [r for r in records if (r["event"] == "epoch") == (missing != "epochs")]
    assert main(["report", str(write(tmp_path / "r", records)), "--html"]) == 0
    assert capsys.readouterr().err == ""


def test_a_file_without_any_record_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="of its 2 lines none can be read"):
        reports.read(write(tmp_path / "r", ["x", "y"]))


def test_a_run_that_is_not_there_is_answered_with_those_near(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("net-cuttlefish-0", "net-dense-0"):
        write(Path("runs") / name, cuttlefish())
    for wrong in (
        "runs/net-cuttlefsh-0",
        "net-cuttlefish-0",
        "runs/net-cuttlefish-00",
    ):
        assert main(["report", wrong]) == 2
        assert f"there is no run {wrong}" in (error := capsys.readouterr().err)
        assert "did you mean runs/net-cuttlefish-0" in error
    assert main(["report", "runs"]) == 2
    assert (
        "runs is no run itself, but holds net-cuttlefish-0, net-dense-0" in capsys.readouterr().err
    )
    Path("runs/net-dens-0").mkdir()
    assert main(["report", "runs/net-dens-0"]) == 2
    assert "did you mean runs/net-dense-0" in capsys.readouterr().err


def test_a_run_that_has_not_ended_says_so_and_shows_what_there_is(tmp_path, capsys):
    folder = write(tmp_path / "r", cuttlefish()[:6])
    assert main(["report", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "not finished: in progress, or interrupted; 1 of 4 epochs so far" in shown
    assert "stable ranks of 2 layers, 2 times" in shown
    assert "120→60" in shown
    assert "validation accuracy   50.00 %" in shown
    assert "test accuracy" not in shown


# ------------------------------------------------------------------ the terminal


def test_every_decision_is_told_in_order(run):
    told = reports.decisions(reports.read(run))
    assert [(d.when, d.kind) for d in told] == [
        (0, "plan"),
        (0, "gains"),
        (0.5, "tracking"),
        (2, "switch due"),
        (2, "switch"),
        (2, "plan"),
        (3, "shrink"),
    ]
    said = {d.kind: d.words for d in told}
    assert "from 0.75× (b) to 3× (a); 1 may become low-rank" in said["gains"]
    assert said["switch due"] == (
        "enough have settled: 1 layer settled (a), 1 layer still moving (b)"
    )
    assert said["switch"] == (
        "Cuttlefish made 1 layer low-rank; parameters 100k → 40.0k (40%); validation loss 0.5000 → "
        "0.6000, 0.5100 once BatchNorm's statistics were gathered anew; 2 moments carried, 1 "
        "fresh; in 0.2 s; learning rate × 0.5"
    )
    assert said["shrink"] == (
        "1 layer (a 40→32); 99.10 % of the energy kept, or more; parameters 40.0k → 36.9k (92%)"
    )


def test_a_plan_that_a_resumed_run_announces_again_is_told_once(tmp_path):
    records = cuttlefish()[:12]
    resumed = [*records, {"event": "resume", "step": 200}, records[-1] | {"step": 201}]
    told = reports.decisions(reports.read(write(tmp_path / "r", resumed)))
    assert [d.kind for d in told][-3:] == ["switch", "plan", "resume"]


def test_an_unknown_event_is_told_by_its_values(tmp_path):
    strange = {"event": "eclipse", "step": 100, "shade": "half", "share": 0.5, "list": [1]}
    told = reports.decisions(reports.read(write(tmp_path / "r", [start(), epoch(1), strange])))
    assert [(d.when, d.kind, d.words) for d in told] == [(1, "eclipse", "shade half, share 0.5")]


def test_layers_end_with_their_last_rank_and_its_cost(run):
    first, a, b = reports.layers(reports.read(run))
    assert (a.rank, a.full_rank, a.shape, a.gain) == (32, 128, "128×256", 3.0)
    assert a.parameters == (128 * 256, 32 * (128 + 256))
    assert a.ratio == 0.25
    assert (a.first, a.last) == (120, 40)
    assert (b.first, b.last) == (100, 88)
    assert (first.rank, first.reason) == (None, "among the first 1")
    assert (b.rank, b.reason) == (None, "slow")
    assert a.reason == ""


def test_a_plan_read_off_a_resumed_network_keeps_the_reasons_of_the_first(tmp_path):
    bare = [entry("b", None, "dense in this model"), entry("a", 40), entry("first", None)]
    again = {"event": "plan", "step": 200, "summary": "", "layers": bare}
    found = reports.layers(reports.read(write(tmp_path / "r", [*cuttlefish()[:12], again])))
    reasons = [(layer.name, layer.reason) for layer in found]
    assert reasons == [("first", "among the first 1"), ("a", ""), ("b", "slow")]


def test_the_terminal_shows_epochs_decisions_ranks_and_figures(run, capsys):
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "net on set, cuttlefish, seed 0, 4 epochs" in shown
    assert "CPU, device cpu" in shown
    assert re.search(r"\n2 +1\.0000 +1\.0500 +75\.00% +0\.05 +10 +10\.0 s\n", shown)
    assert re.search(r"\na +128×256 +32 of 128 +0\.25 +32\.8k→12\.3k +3\.00× +120→40 .*│\n", shown)
    assert re.search(r"\nb +128×256 +dense \(2\) +32\.8k +0\.75× ", shown)
    assert "(2) slow" in shown
    assert re.search(r"parameters stored +40\.0k +100k +0\.40×", shown)
    assert re.search(r"parameters trainable +39\.0k +99\.0k +0\.39×", shown)
    assert re.search(r"training step +6 ms +10 ms +0\.60×", shown)
    assert re.search(r"switch at epoch +2\b", shown)


def test_long_runs_show_a_dozen_epochs_the_first_and_the_last_among_them(tmp_path, capsys):
    records = [start(epochs=300), *(epoch(n) for n in range(1, 301))]
    main(["report", str(write(tmp_path / "r", records))])
    shown = re.findall(r"^(\d+) +\d\.\d{4} ", capsys.readouterr().out, re.MULTILINE)
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == ("1", "300")


def test_nothing_that_a_terminal_obeys_is_printed(tmp_path, capsys):
    records = json.loads(json.dumps(cuttlefish()).replace('"a"', json.dumps(HOSTILE)))
    records[0]["recipe"]["model"] = records[0]["method"] = HOSTILE + "\r\n\x07[bold red]loud[/]"
    folder = write(tmp_path / "r", records)
    assert main(["report", str(folder), str(write(tmp_path / "s", records))]) == 0
    shown = capsys.readouterr().out
    assert all(c == "\n" or c.isprintable() for c in shown)
    assert "[bold red]loud[/]" in shown  # said, not done


def test_a_language_model_is_judged_by_its_perplexity(tmp_path, capsys):
    head = start() | {"data": {"name": "book", "task": "language modelling"}}
    main(["report", str(write(tmp_path / "r", [head, epoch(1), finish(test_loss=math.log(16))]))])
    shown = capsys.readouterr().out
    assert re.search(r"test perplexity +16\b", shown)
    assert re.search(r"test bits a token +4\b", shown)
    assert "test accuracy" not in shown


def test_report_imports_no_torch(run):
    code = (
        "import sys\nfrom rankwise.cli import main\n"
        f"assert main(['report', {str(run)!r}, '--html']) == 0\n"
        "heavy = {'torch', 'numpy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_sparkline_falls_and_shows_the_switch_where_it_was():
    points = [(float(x), 8.0 - x) for x in range(8)]
    assert sparkline(points, 0, 7, [], width=8) == "█▇▆▅▄▃▂▁"
    assert sparkline(points, 0, 7, [4.0], width=8) == "█▇▆▅│▃▂▁"
    assert sparkline([(0, math.nan), (1, 4.0)], 0, 3, [], width=4) == " █  "
    assert sparkline([(0, 4.0), (3, 2.0)], 0, 3, [], width=4) == "███▄"
    assert sparkline([], 0, 1, [], width=3) == "   "
    assert sparkline([(0, 0.0), (1, 0.0)], 0, 0, [], width=2) in ("▁ ", " ▁", "▁▁")


# ------------------------------------------------------------------ dense beside it


def histories(tmp_path: Path, **runs: list[dict]) -> dict[str, reports.History]:
    return {name: reports.read(write(tmp_path / name, records)) for name, records in runs.items()}


def dense(seed: int, **recipe) -> list[dict]:
    head = start(method="dense", seed=seed, **recipe)
    return [
        head,
        epoch(1),
        finish(test_accuracy=0.92, step_ms_low_rank=None, parameters=[100_000] * 2),
    ]


def test_a_run_is_set_against_dense_of_its_network_and_data_its_seed_first(tmp_path):
    given = histories(
        tmp_path, low=cuttlefish(), d1=dense(1), d0=dense(0), other=dense(0, model="another")
    )
    found = list(given.values())
    assert figures.dense_run(given["low"], found) is given["d0"]
    assert (
        figures.dense_run(given["low"], [given["low"], given["d1"], given["other"]]) is given["d1"]
    )
    assert figures.dense_run(given["low"], [given["low"], given["other"]]) is None
    told = {f.name: f for f in reports.closing(given["low"], given["d0"])}
    assert told["test accuracy"].against == "-2.00 points"
    assert told["test accuracy"].dense == "92.00 %"
    assert told["training step"].against == "0.60×"
    assert not any(f.against for f in reports.closing(given["d0"], given["d0"]))


def test_another_recipe_than_that_of_dense_is_said(tmp_path, capsys):
    given = histories(tmp_path, low=cuttlefish(), dense=dense(0, epochs=9))
    assert figures.differences(given["low"], given["dense"]) == ["epochs 4, there 9"]
    main(["report", str(tmp_path / "low"), str(tmp_path / "dense"), "--html"])
    assert "another recipe than dense: epochs 4, there 9" in capsys.readouterr().out
    assert "low against dense: epochs 4, there 9" in (tmp_path / "report.html").read_text()


def test_a_run_that_goes_on_is_not_set_against_one_that_has_ended(tmp_path):
    given = histories(tmp_path, low=cuttlefish()[:-1], dense=dense(0))
    assert all(not f.against for f in reports.closing(given["low"], given["dense"]))


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write(tmp_path / name / "run", cuttlefish()) for name in ("x", "y")]
    assert plots.names([reports.read(folder) for folder in folders]) == ["x/run", "y/run"]


def test_a_run_named_twice_is_shown_once(run, capsys):
    assert main(["report", str(run), str(run / "records.jsonl")]) == 0
    assert "side by side" not in capsys.readouterr().out


# ------------------------------------------------------------------ the page


class Checked(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""


def test_nothing_in_a_record_becomes_markup(tmp_path):
    text = json.dumps(cuttlefish())
    for word in ("a", "b", "net", "set", "slow", "Cuttlefish", "enough have settled", "CPU"):
        text = text.replace(f'"{word}"', json.dumps(HOSTILE + word))
    plain = reports.read(write(tmp_path / "r", cuttlefish()))
    first = Checked(reports.page([plain, plain]))
    folder = write(tmp_path / HOSTILE.replace("/", "").replace("\x1b", ""), json.loads(text))
    history = reports.read(folder)
    page = reports.page([history, history])
    spoilt = Checked(page)
    assert spoilt.tags == first.tags  # the same elements, other words
    assert [name for name, _ in spoilt.attributes] == [name for name, _ in first.attributes]
    assert printable(HOSTILE + "slow") in spoilt.text
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert page.count("</style>") == 1


def test_a_page_needs_no_network_and_no_script(run):
    page = reports.page([reports.read(run)])
    assert set(re.findall(r"https?://[^\"' )]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|<link|<iframe|@import|url\(|\son\w+=", page)


def test_plots_are_well_formed_and_have_a_text_in_their_place(run):
    page = reports.page([reports.read(run)])
    drawings = [ElementTree.fromstring(d) for d in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert (
        len(drawings) == 5 + 2
    )  # stable ranks, loss, accuracy, rate, time; and one a tracked layer
    for drawing in drawings:
        hidden = drawing.get("aria-hidden") == "true"
        assert hidden or (drawing.get("role") == "img" and drawing.get("aria-label"))
    assert "Scaled stable rank of 2 layers over epochs" in page


def test_the_page_tells_what_the_terminal_does(run):
    text = Checked(reports.page([reports.read(run)])).text
    for decision in reports.decisions(reports.read(run)):
        assert decision.words in text
    for word in (
        "90.00 %",
        "0.40×, dense 100k",
        "among the first 1",
        "120 → 40",
        "switch",
        "Cuttlefish()",
    ):
        assert word in text


def test_several_runs_share_their_plots_and_a_table(tmp_path):
    given = histories(tmp_path, low=cuttlefish(), dense=dense(0), going=cuttlefish()[:7])
    page = reports.page(list(given.values()))
    text = Checked(page).text
    assert "3 runs" in text
    assert "-2.00 points" in text
    assert "going: not finished: in progress" in text
    accuracy = next(
        plot for name, plot in plots.metrics(list(given.values())) if "accuracy" in name
    )
    assert [line.name for line in accuracy.lines] == ["low", "dense", "going"]
    assert len({line.style for line in accuracy.lines}) == 3


def test_a_page_is_written_beside_its_run_and_replaces_reports_only(run, capsys, tmp_path):
    assert main(["report", str(run), "--html"]) == 0
    assert main(["report", str(run), "--html"]) == 0
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    before = (run / "records.jsonl").read_text()
    for wrong in (run / "records.jsonl", run):
        assert main(["report", str(run), "--html", str(wrong)]) == 2
        assert "is no report of rankwise" in capsys.readouterr().err
    assert (run / "records.jsonl").read_text() == before
    with pytest.raises(OptionError, match="cannot be written: No such file"):
        reports.write([reports.read(run)], tmp_path / "nowhere" / "x.html")
    assert sorted(p.name for p in run.iterdir()) == ["records.jsonl", "report.html"]


def test_a_page_that_cannot_be_made_leaves_nothing_behind(run, monkeypatch):
    def fail(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setitem(reports.write.__globals__, "page", fail)  # the package has a `page` too
    with pytest.raises(KeyboardInterrupt):
        reports.write([reports.read(run)], run / "report.html")
    assert [p.name for p in run.iterdir()] == ["records.jsonl"]


def test_durations_are_told_in_the_unit_that_suits():
    shown = [words.duration(s) for s in (0.5, 119.0, 180.0, 7_140.0, 7_200.0, 90_000.0, math.inf)]
    assert shown == ["0.5 s", "119.0 s", "3.0 min", "119.0 min", "2.0 h", "25.0 h", "–"]


def test_sixty_layers_stay_legible(tmp_path):
    names = [f"blocks.{i}.some.very.long.name.of.a.layer.{i}" for i in range(60)]
    records = [
        start(),
        {"event": "plan", "step": 0, "layers": [entry(name, 30) for name in names]},
        *(
            stable(t, **{n: 500 / (1 + t) + i for i, n in enumerate(names)})
            for t in (0.5, 1.0, 1.5)
        ),
        epoch(1),
    ]
    history = reports.read(write(tmp_path / "r", records))
    plot = plots.stable_ranks(history, reports.layers(history))
    assert plot is not None
    assert len(plot.lines) == 60
    labels = plot.draw().findall("text[@class]")
    labels = [text for text in labels if "name" in (text.get("class") or "")]
    assert 4 <= len(labels) <= plots.NAMED
    assert len({line.style for line in plot.lines}) == style.DEPTHS
    assert plot.lines[7].name == "7.some.very.long.name.of.a.layer.7"
    assert "All names begin with blocks." in reports.page([history])
    heights = sorted(float(text.get("y") or 0) for text in labels)
    gaps = [b - a for a, b in itertools.pairwise(heights)]
    assert min(gaps) >= svg.LINE_HEIGHT - 0.02
    assert heights[0] > 0
    assert heights[-1] < plot.height
    assert Checked(reports.page([history])).tags.count("tr") >= 60


def test_long_curves_are_thinned_evenly_and_keep_both_ends():
    for count in (0, 1, 239, 240, 241, 10_000):
        points = [(float(i), 1.0) for i in range(count)]
        kept = svg.thinned(points)
        assert len(kept) <= min(count, svg.MOST_POINTS + 1)
        assert kept[:1] == points[:1]
        assert kept[-1:] == points[-1:]
    assert len(svg.thinned([(float(i), 1.0) for i in range(240)])) == 240


def test_a_curve_breaks_where_there_is_no_number():
    nan = math.nan
    line = svg.Line(name="a", points=[(0, 1.0), (1, nan), (2, 3.0), (3, 4.0)], style="d0")
    drawn = ElementTree.tostring(svg.Plot(title="t", x="x", y="y", lines=[line]).draw(), "unicode")
    path = re.findall(r' d="([^"]*)"', drawn)[0]
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert "nan" not in drawn


@pytest.mark.parametrize("scale", ["tight", "zero", "log"])
@pytest.mark.parametrize(
    "values",
    [[], [math.nan], [0.0], [5.0], [5.0, 5.0], [-3.0, 0.0], [1e308, -1e308], [1e-320, 1.0],
     [1e-9, 1e9], [0.0, 1e-12], [math.inf, 1.0]],
)  # fmt: skip
def test_any_numbers_make_a_plot_within_its_frame(scale, values):
    line = svg.Line(name="a", points=list(enumerate(values)), style="d0")
    drawn = svg.Plot(title="t", x="x", y="y", lines=[line], scale=scale).draw()
    for element in drawn.iter():
        for name in ("x", "y", "x1", "y1", "cx", "cy"):
            assert -1 <= float(element.get(name, 0)) <= 860
        for x, y in re.findall(r"[ML](\S+) (\S+)", element.get("d", "")):
            assert 0 <= float(x) <= 860
            assert 0 <= float(y) <= 340


def test_ticks_are_round_few_and_within():
    for low, high in ((0, 30), (0.123, 0.456), (-7, 3), (1e-9, 2e-9), (5, 5e6)):
        found = svg.ticks(low, high)
        assert 2 <= len(found) <= 8
        steps = {round(b - a, 15) for a, b in itertools.pairwise(found)}
        digits = f"{min(steps):e}"
        assert digits[0] in "125"
        assert set(digits.partition("e")[0][2:]) <= {"0", "9"}
        assert all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) for tick in found)
    assert svg.ticks(1, 1) == []
    assert svg.ticks(0, math.inf) == []
    assert svg.log_ticks(3, 120) == [5, 10, 20, 50, 100]


@pytest.mark.parametrize("high", [8e-12, 0.0008, 0.05, 3.0, 80.0, 4e5, 7e11])
def test_the_labels_of_ticks_fit_beside_the_axis(high):
    line = svg.Line(name="a", points=[(0, 0.0), (1, high)], style="d0")
    drawn = svg.Plot(title="t", x="x", y="y", lines=[line], scale="zero").draw()
    shown = [text.text or "" for text in drawn.findall("text[@text-anchor='end']")]
    assert len(set(shown)) == len(shown) >= 3
    assert all(len(text) <= 6 for text in shown)


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_from_their_ground(dark):
    light_half, _, rest = style.sheet().partition("@media(prefers-color-scheme:dark)")
    theme = rest.partition("}}")[0] if dark else light_half
    named = dict(re.findall(r"--(\w+):(#\w{6})", theme))
    for ground in ("ground", "card"):
        for text in ("text", "soft", "warn", "accent"):
            assert contrast(named[text], named[ground]) >= 4.5, (text, ground)
    lines = dict(re.findall(r"\.([dr]\d+)\{color:(#\w{6})", theme))
    assert len(lines) == style.DEPTHS + style.RUNS
    for name, colour in lines.items():  # labels are written in them too
        assert contrast(colour, named["ground"]) >= 4.5, name


# ------------------------------------------------------------------ runs as they are


@pytest.mark.parametrize("method", ["dense", "pufferfish", "cuttlefish"])
def test_a_run_of_this_version_is_told(method, tmp_path, monkeypatch, capsys):
    splits = data.Splits(
        name="planted",
        classes=("a", "b", "c", "d"),
        train=planted(0, 256),
        validation=planted(1, 64),
        test=planted(2, 64),
        checksum="0123456789abcdef",
    )
    monkeypatch.setattr(data, "load", lambda name, **_: splits)
    line = (
        f"train --model mlp-128x4 --epochs 4 --batch-size 32 --method {method} --out {tmp_path}/r"
    )
    more = {
        "pufferfish": "--method.ranks 16",
        "cuttlefish": "--method.ranks 16 --method.gains none",
    }
    assert main([*line.split(), *more.get(method, "").split()]) == 0
    capsys.readouterr()
    assert main(["report", f"{tmp_path}/r", "--html"]) == 0
    shown = capsys.readouterr().out
    history = reports.read(tmp_path / "r")
    assert not history.skipped
    assert not history.doubts
    assert not history.state
    told = [decision.kind for decision in reports.decisions(history)]
    if method == "dense":
        assert told == []
    else:
        assert "switch" in told
        assert re.search(r"hidden\.0 +128×128 +16 of 128 +0\.12", shown)
    if method == "cuttlefish":
        assert told.index("tracking") < told.index("switch due") < told.index("switch")
        assert "│" in shown


def test_the_command_takes_runs_and_a_page():
    asked = parse(["report", "a", "b", "--html"])
    assert (asked.run, asked.html) == (["a", "b"], "")
    assert parse(["report", "a", "--html", "x.html"]).html == "x.html"
    with pytest.raises(OptionError, match="unknown flag --htm"):
        parse(["report", "a", "--htm"])
    with pytest.raises(OptionError, match="required: RUN"):
        parse(["report"])
