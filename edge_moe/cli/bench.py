"""`edge-moe bench`: the speed of reading a prompt and of generating, measured as llama-bench does."""

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_moe.cli.answer import experts_line
from edge_moe.cli.loading import load_model
from edge_moe.cli.options import (
    MAX_TOKENS,
    Parser,
    add_backend_option,
    add_kv_option,
    add_ram_option,
    add_threads_option,
    check_model_path,
    model_settings,
    number_list,
    whole_number,
)
from edge_moe.cli.report import (
    Display,
    format_duration,
    print_table,
    write_json,
)
from edge_moe.errors import OptionError

if TYPE_CHECKING:
    import numpy as np

    from edge_moe.api import Model
    from edge_moe.generate import Cache

_DESCRIPTION = """\
Measure a model's speed in tokens per second, as llama-bench does: random tokens, one warm-up, the median of the runs.

pp512 reads a prompt of 512 tokens, tg32 generates 32 tokens one by one; @d4096 means behind 4096 tokens of context."""

_EXAMPLES = """\
examples:
  edge-moe bench model.gguf
  edge-moe bench model.gguf -p 512 -n 32 -d 0,4096 -r 3 --json"""


@dataclass
class Test:
    """One kind of measurement: seconds and tokens of each run, and the time to the first token of a prompt."""

    name: str
    n_tokens: int
    seconds: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    experts: dict[str, Any] = field(default_factory=dict)  # what a bounded store did, and its plain words
    experts_line: str = ""

    @property
    def runs(self) -> list[float]:
        """Tokens per second of each run."""
        return [self.n_tokens / seconds for seconds in self.seconds]

    def report(self) -> dict[str, object]:
        """The entry of this test in the JSON list."""
        entry: dict[str, object] = {
            "test": self.name,
            "tok_per_s": statistics.median(self.runs),
            "runs": self.runs,
        }
        if self.first_token_s:
            entry["first_token_s"] = statistics.median(self.first_token_s)
        return entry | self.experts


def parser(prog: str) -> Parser:
    """The options of `bench`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} MODEL [options]")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a .gguf file")
    add(
        "-p",
        "--n-prompt",
        metavar="N",
        type=whole_number(0, MAX_TOKENS),
        default=512,
        help="tokens of the prompt (default 512; 0: skip)",
    )
    add(
        "-n",
        "--n-gen",
        metavar="N",
        type=whole_number(0, MAX_TOKENS),
        default=32,
        help="tokens to generate (default 32; 0: skip)",
    )
    add(
        "-d",
        "--n-depth",
        metavar="N,N",
        type=number_list(0, MAX_TOKENS),
        default=[0],
        help="tokens of context before the test (default 0)",
    )
    add("-r", "--repetitions", metavar="N", type=whole_number(1, 1000), default=3, help="runs of each test (default 3)")
    add_kv_option(parser)
    add_backend_option(parser)
    add_ram_option(parser)
    add_threads_option(parser)
    add("--json", action="store_true", help="print one JSON list")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Load the model, run the tests, print the table or the list."""
    path = check_model_path(args.model)
    if args.n_prompt == 0 and args.n_gen == 0:
        raise OptionError("nothing to measure: -p and -n are both 0")
    with Display() as display:
        started = time.perf_counter()
        # with a budget the cache's share of it is that of the longest test
        context = max(args.n_depth) + max(args.n_prompt, args.n_gen) if args.ram else None
        model = load_model(path, display, context_length=context, **model_settings(args))
        load_s = time.perf_counter() - started
        tests = measure(model, args.n_prompt, args.n_gen, args.n_depth, args.repetitions, display)
    if args.json:
        write_json([test.report() for test in tests])
    else:
        rows = [
            [
                test.name,
                f"{statistics.median(test.runs):.2f}",
                f"{min(test.runs):.2f}",
                f"{max(test.runs):.2f}",
                format_duration(statistics.median(test.first_token_s)) if test.first_token_s else "",
            ]
            for test in tests
        ]
        place = f"{model.threads} threads" if model.device_name is None else model.device_name
        title = f"{path.name}, {place}, loaded in {format_duration(load_s)}"
        print_table(title, ["test", "tok/s (median)", "min", "max", "first token"], rows)
        for test in tests:
            if test.experts_line:
                sys.stdout.write(f"{test.name}: {test.experts_line}\n")
    return 0


def measure(
    model: "Model", n_prompt: int, n_gen: int, depths: list[int], repetitions: int, display: Display
) -> list[Test]:
    """Run all tests, at each depth first the prompt, then the generation.

    Raises OptionError when depth and test together exceed the model's context.
    """
    from edge_moe.expert_store import StoreStats

    longest = max(depths) + max(n_prompt, n_gen)
    limit = model.config.max_position_embeddings
    if longest > limit:
        raise OptionError(f"-d and -p or -n make {longest} tokens; the model's context is {limit}")
    kinds = [(f"pp{n_prompt}", n_prompt, _time_prompt), (f"tg{n_gen}", n_gen, _time_generation)]
    kinds = [kind for kind in kinds if kind[1]]
    n_steps = len(depths) * (1 + len(kinds) * (1 + repetitions))
    steps = itertools.count()
    tests: list[Test] = []
    for depth in depths:
        cache = model.new_cache(depth + max(n_prompt, n_gen))
        display.show("measuring", next(steps), n_steps, f"filling {depth} tokens")
        _prefill(model, _random_ids(model, depth, seed=0), cache)
        for kind, n_tokens, run in kinds:
            test = Test(f"{kind}@d{depth}" if depth else kind, n_tokens)
            for repetition in range(repetitions + 1):
                display.show("measuring", next(steps), n_steps, f"{test.name}, run {repetition or 'to warm up'}")
                # the first run is not counted: it compiles kernels and reads the weights from the disk
                # other tokens each time: experts in memory because the same ones were run before would prove nothing
                tested = _random_ids(model, n_tokens, seed=len(tests) * 1000 + repetition + 1)
                run(model, tested, cache, test if repetition else Test(kind, n_tokens))
                cache.truncate(depth)
                if not repetition and model.expert_store is not None:
                    model.expert_store.stats = StoreStats()
            if model.expert_store is not None:
                test.experts, test.experts_line = model.expert_store.stats.report(), experts_line(model.expert_store)
            tests.append(test)
    return tests


def _prefill(model: "Model", ids: "np.ndarray", cache: "Cache") -> "np.ndarray":
    """Feed tokens in the chunks of generation; returns the logits f32[1,vocab] after the last one."""
    import numpy as np

    from edge_moe.generate import PREFILL_CHUNK

    logits = np.zeros((1, 1), np.float32)
    for start in range(0, len(ids), PREFILL_CHUNK):
        logits = model.forward(ids[start : start + PREFILL_CHUNK], cache)
    return logits


def _time_prompt(model: "Model", ids: "np.ndarray", cache: "Cache", test: Test) -> None:
    started = time.perf_counter()
    logits = _prefill(model, ids, cache)
    test.seconds.append(time.perf_counter() - started)
    logits[-1].argmax()
    test.first_token_s.append(time.perf_counter() - started)


def _time_generation(model: "Model", ids: "np.ndarray", cache: "Cache", test: Test) -> None:
    started = time.perf_counter()
    for index in range(len(ids)):
        model.forward(ids[index : index + 1], cache)
    test.seconds.append(time.perf_counter() - started)


def _random_ids(model: "Model", n: int, *, seed: int) -> "np.ndarray":
    """Random tokens, so that the experts are chosen as varied as by text; the same ones for a seed."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, model.config.vocab_size, n)
