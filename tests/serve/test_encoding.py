"""Titles and pictures of new items, encoded as the run notes it: see `hellm.serve.encoding.Encoders`."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import hellm.features.image
import hellm.features.text
from hellm.data import ItemFeatures
from hellm.data.attributes import AttributeSet
from hellm.data.simple_features import image_features
from hellm.models.graph.content import ItemContent
from hellm.serve.encoding import Encoders
from hellm.serve.errors import RequestError
from hellm.serve.schema import ItemRequest


def content(encoders: dict, **widths: int) -> ItemContent:
    draw = np.random.default_rng(0)
    told = {name: ItemFeatures.from_values(draw.normal(size=(6, width))) for name, width in widths.items()}
    brands = AttributeSet.of([["acme"], ["lux"]] * 3)
    return ItemContent.of(told, k=2, attributes={"brand": brands}, encoders=encoders)


class Texts:
    """Rows of a number, and the texts that were asked for."""

    def __init__(self, number: float) -> None:
        self.number, self.asked = number, []

    def features(self, texts):
        self.asked += texts
        return ItemFeatures.from_values(np.full((len(texts), 4), self.number, np.float32))


@pytest.fixture
def loaded(monkeypatch) -> list:
    """(name, options, encoder) of every text encoder that is loaded."""
    found = []

    def load(name, **options):
        found.append((name, options, Texts(len(found) + 1.0)))
        return found[-1][2]

    monkeypatch.setattr(hellm.features.text, "load_text_encoder", load)
    return found


def refusal(encoders: Encoders, known: ItemContent, item: ItemRequest, picture: bytes | None = None) -> RequestError:
    with pytest.raises(RequestError) as caught:
        encoders(known, item, picture)
    assert caught.value.status == 422
    return caught.value


def test_texts_are_made_of_the_fields_of_the_run(loaded):
    item = ItemRequest(id="n", title="Red mug", description="For tea.", attributes={"brand": ["acme", "lux"]})
    encoders = Encoders()
    known = content({"words": {"encoder": "minilm", "text_fields": ["title", "brand"], "max_length": 9}}, words=4)
    assert encoders(known, item, None)["words"].tolist() == [1.0] * 4
    assert encoders(known, item, None)["words"].tolist() == [1.0] * 4
    ((name, options, encoder),) = loaded
    assert (name, options, encoder.asked) == ("minilm", {"device": "cpu", "max_length": 9}, ["Red mug acme lux"] * 2)
    # All fields, where the run does not say.
    encoders(content({"text": {"encoder": "mpnet"}}, text=4), item, None)
    assert loaded[1][0] == "mpnet" and loaded[1][2].asked == ["Red mug acme lux For tea."]


def test_a_run_that_takes_over_brings_its_encoder(loaded):
    item, encoders = ItemRequest(id="n", title="Red mug"), Encoders()
    for name, number in (("minilm", 1), ("mpnet", 2), ("mpnet", 2)):
        found = encoders(content({"text": {"encoder": name}}, text=4), item, None)
        assert found["text"].tolist() == [number] * 4
    assert [name for name, _, _ in loaded] == ["minilm", "mpnet"]


def test_only_packaged_encoders_are_used_unless_the_server_is_told(loaded):
    item = ItemRequest(id="n", title="Red mug")
    for about, why in (
        ({}, "does not say which encoder"),
        ({"text": {"encoder": "hashed"}}, "hashed words"),
        ({"text": {"encoder": "some/id"}}, "by encoder 'some/id', which comes in no package"),
        ({"text": {"encoder": "/etc"}}, "by encoder '/etc'"),
        # Of pictures: as a text encoder it would be looked for elsewhere.
        ({"text": {"encoder": "efficientnet"}}, "by encoder 'efficientnet'"),
        ({"text": {"encoder": "llm", "language_model": "/models/x"}}, "by encoder 'llm'"),
    ):
        error = refusal(Encoders(), content(about, text=4), item)
        assert why in error.message and error.field == "title" and "give features.text" in error.message
        # Nothing gives what hashed words are.
        assert ("--encoder text=NAME" in error.message) == (about.get("text") != {"encoder": "hashed"})
    assert not loaded
    known = content({"text": {"encoder": "llm", "language_model": "/models/x", "num_layers": 2}}, text=4)
    Encoders({"text": "llm"})(known, item, None)
    assert [one[:2] for one in loaded] == [("llm", {"device": "cpu", "language_model": "/models/x", "num_layers": 2})]


def test_an_encoder_that_is_known_for_another_than_that_of_the_run_is_refused(loaded):
    item = ItemRequest(id="n", title="Red mug")
    told = "--encoder text={} of the server is another encoder than {!r}, by which the run has its features"
    for about, chosen in (
        ({"encoder": "minilm", "key": "ab"}, "/models/minilm"),
        ({"encoder": "/models/a", "key": "ab"}, "/models/a"),
        ({"encoder": "minilm"}, "mpnet"),
        ({"encoder": "hashed"}, "/models/a"),
    ):
        error = refusal(Encoders({"text": chosen}), content({"text": about}, text=4), item)
        assert told.format(chosen, about["encoder"]) in error.message and error.field == "title"


def test_an_encoder_of_the_same_weights_or_of_which_nothing_is_known_is_taken(loaded, monkeypatch):
    item, encoders = ItemRequest(id="n", title="Red mug"), Encoders({"text": "/models/a"})
    monkeypatch.setattr(Texts, "key", "ab", raising=False)
    for about in ({"encoder": "minilm", "key": "ab"}, {"encoder": "minilm"}, {"encoder": "/models/b"}, {}):
        assert len(encoders(content({"text": about}, text=4), item, None)["text"]) == 4
    # What was good for one run is not for another that takes over.
    refusal(encoders, content({"text": {"encoder": "minilm", "key": "cd"}}, text=4), item)


def test_an_encoder_that_cannot_be_loaded_or_does_not_fit_is_told(loaded, monkeypatch):
    item, known = ItemRequest(id="n", title="Red mug"), content({"text": {"encoder": "minilm"}}, text=5)
    assert refusal(Encoders(), known, item).message == "the encoder of text gives 4 numbers, and the run has 5"
    for error in (ImportError("no package"), OSError("no folder"), TypeError("no number")):

        def fail(*given, error=error, **named):
            raise error

        monkeypatch.setattr(hellm.features.text, "load_text_encoder", fail)
        assert "the encoder of text cannot be loaded here" in refusal(Encoders(), known, item).message


def picture(colour: str) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (60, 50), colour).save(written, "png")
    return written.getvalue()


def test_pictures(tmp_path, monkeypatch):
    item = ItemRequest(id="n")
    known = content({"image": {"encoder": "colours"}}, image=240)
    (tmp_path / "red.png").write_bytes(picture("red"))
    expected = image_features([tmp_path / "red.png"]).values[0]
    assert np.array_equal(Encoders()(known, item, picture("red"))["image"], expected)
    error = refusal(Encoders(), known, item, b"no picture")
    assert error.field == "picture" and "must be a picture that can be read (UnidentifiedImageError)" in error.message
    for name in ("minilm", "some/id", "hashed"):
        error = refusal(Encoders(), content({"image": {"encoder": name}}, image=240), item, picture("red"))
        assert error.field == "picture" and "give features.image in the request" in error.message
    asked = []
    monkeypatch.setattr(
        hellm.features.image, "load_image_encoder", lambda *given, **named: asked.append((given, named))
    )
    with pytest.raises(AttributeError):
        Encoders({"image": "some/id"})(content({"image": {"encoder": "other/id"}}, image=240), item, picture("red"))
    assert asked == [(("some/id",), {"device": "cpu"})]
