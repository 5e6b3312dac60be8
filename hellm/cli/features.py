"""`hellm features`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hellm._folders import check_target, hold
from hellm.cli._output import count, duration, print_json
from hellm.cli._parser import add_engine, new_parser, parse
from hellm.cli.data import add_reading_options, reading_options

__all__ = ["CACHE_HELP", "run"]

CACHE_HELP = (
    "folder for encoded texts and pictures, and neighbours, which are kept for the next time; default: ~/.cache/hellm"
)


def run(argv: Sequence[str]) -> int:
    args = parse(_parser(), argv)
    out, started = Path(args.out), time.perf_counter()
    check_target(out, kind="data", overwrite=args.overwrite, inputs=[args.data])
    with hold(out, beside=True):
        return _encode(args, out, started)


def _encode(args, out: Path, started: float) -> int:
    from hellm._devices import resolve_device
    from hellm.data import load_dataset, save_dataset
    from hellm.engines import engine_of
    from hellm.features import add_features, choose_encoders
    from hellm.features.cache import default_cache

    device = resolve_device(args.device)
    engine = engine_of(args.engine, args.workers, device)
    dataset = load_dataset(args.data, **reading_options(args))
    encoders = {name: None if args[name] == "none" else args[name] for name in ("text", "image")}
    fields = args.text_fields.replace(",", " ").split()
    chosen = choose_encoders(dataset, **encoders, text_fields=fields)
    dataset = add_features(
        dataset,
        **encoders,
        text_name=args.text_name,
        text_fields=fields,
        language_model=args.llm,
        num_layers=args.llm_layers,
        batch_size=args.batch_size,
        max_length=args.max_length,
        bfloat16=args.bfloat16,
        device=device,
        engine=engine,
        cache=default_cache() if args.cache is None else args.cache,
    )
    save_dataset(dataset, out, overwrite=args.overwrite)
    seconds, encoded = time.perf_counter() - started, {}
    for modality, encoder in chosen.items():
        name = args.text_name if modality == "text" else modality
        features = dataset.item_features[name]
        encoded[name] = {"encoder": encoder, "dim": features.values.shape[1], "missing": int((~features.mask).sum())}
    if args.json:
        print_json({"out": str(out), "encoded": encoded, "seconds": seconds} | dataset.summary())
        return 0
    print(f"{out}: {count(dataset.num_items)} items in {duration(seconds)}")
    for name, one in encoded.items():
        print(f"  {name}: {one['dim']} numbers per item by {one['encoder']}, {count(one['missing'])} items without")
    for note in dataset.notes:
        print(f"  note: {note}")
    return 0


def _parser():
    parser = new_parser(
        "features",
        "DATA --out DIR [options]",
        "Encode the texts and pictures of the items with pre-trained encoders, and write the data set in hellm's own "
        "form with the result. Rows go into a cache as they are made: a run that was stopped goes on where it was, and "
        "a changed item costs one row. Without --text and --image, the encoders that come in packages "
        '(pip install "hellm[encoders]") take whatever the data have.',
    )
    parser.add_argument("data", metavar="DATA", help="folder or file of any known form")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--text",
        default="auto",
        metavar="ENCODER",
        help="minilm or mpnet, which come in packages; llm, the hidden states of a language model; folder or hub id of "
        "a transformers encoder; or none",
    )
    parser.add_argument(
        "--text-name", default="text", metavar="NAME", help="what the features of texts are called in the data set"
    )
    parser.add_argument(
        "--text-fields",
        default="title,brand,category,description",
        metavar="A,B,...",
        help="what makes the text of an item, where the data have it",
    )
    parser.add_argument(
        "--llm", default="smollm2-135m", metavar="MODEL", help="of --text llm: folder, .gguf file or hub id"
    )
    parser.add_argument(
        "--llm-layers", type=int, default=4, metavar="N", help="of --text llm: first layers that are run"
    )
    parser.add_argument(
        "--image",
        default="auto",
        metavar="ENCODER",
        help="the same for pictures: a vision model, efficientnet, or none",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts or pictures encoded at once")
    parser.add_argument("--max-length", type=int, default=256, metavar="N", help="tokens of a text that count")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="multiply matrices of text encoders in bfloat16, which is faster on many machines and about 0.7% off",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--cache", metavar="DIR", help=CACHE_HELP)
    add_engine(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--json", action="store_true", help="print what was written as one line of JSON")
    add_reading_options(parser)
    return parser
