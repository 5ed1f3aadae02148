"""Speed of the evaluator's engines on one graph, turn by turn in one process.

    python benchmarks/evaluator_engines.py --inception_path GRAPH [--threads 2] [--half] [--compile]

Without the real graph, make the stand-in: `python tests/evaluations/graph_writer.py GRAPH`.
Turns alternate, so that a load on the machine meets every engine; CPU time is given beside wall
time, since it does not count what other programs take.
"""

import argparse
import os
import time

import numpy as np


def images(count: int, size: int) -> np.ndarray:
    """Smooth colour ramps uint8 [N, size, size, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size][..., None] / size
    slopes = rng.uniform(-200, 200, (2, count, 1, 1, 3))
    return np.clip(128 + slopes[0] * y + slopes[1] * x, 0, 255).astype(np.uint8)


def compiled(engine):
    """The PyTorch engine's steps as one function of torch.compile, which the evaluator has not."""
    import torch

    from evaluations.graph_file import IMAGES_NODE

    def outputs(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {IMAGES_NODE: pixels}
        for name, function, inputs, _ in engine._steps:
            values[name] = function(*(values[source] for source in inputs))
        return tuple(values[name].float() for name in engine._outputs)

    run = torch.compile(outputs)

    def call(batch: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.inference_mode():
            pixels = torch.from_numpy(batch).to(engine.device).float()
            return tuple(output.cpu().numpy() for output in run(pixels))

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inception_path", required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="of the images")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--half", action="store_true", help="bfloat16 on a CPU, float16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile in float32, too")
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[name] = str(args.threads)  # before either engine is loaded

    import torch

    from evaluations.features import choose_engine, features_of_batch, load_graph

    torch.set_num_threads(args.threads)
    graph = load_graph(args.inception_path)
    kinds = [("tensorflow", "float32"), ("torch", "float32")]
    if args.half:
        kinds.append(("torch", "float16" if torch.cuda.is_available() else "bfloat16"))
    engines = [choose_engine(graph, *kind) for kind in kinds]
    if args.compile:
        kinds.append(("torch.compile", "float32"))
        engines.append(compiled(engines[1]))
    batch = images(args.batch_size, args.size)
    outputs = [features_of_batch(engine, batch) for engine in engines]  # warms up, too
    seconds = np.zeros((len(kinds), 2))
    for _ in range(args.turns):
        for index, engine in enumerate(engines):
            wall, cpu = time.perf_counter(), time.process_time()
            engine(batch)
            seconds[index] += time.perf_counter() - wall, time.process_time() - cpu
    rates = args.turns * args.batch_size / seconds
    print(f"{args.turns} turns of {args.batch_size} images of {args.size}, {args.threads} threads")
    print("| engine | images/s (wall) | images per CPU second | pool | spatial |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind, rate, output in zip(kinds, rates, outputs, strict=True):
        errors = [np.abs(a - b).max() / np.ptp(b) for a, b in zip(output, outputs[0], strict=True)]
        ratios = rate / rates[0]
        print(
            f"| {' '.join(kind)} | {rate[0]:.2f} ({ratios[0]:.2f} x) | "
            f"{rate[1]:.2f} ({ratios[1]:.2f} x) | {errors[0]:.1e} | {errors[1]:.1e} |"
        )
    print("Errors: largest difference from TensorFlow over the range of the features.")


if __name__ == "__main__":
    main()
