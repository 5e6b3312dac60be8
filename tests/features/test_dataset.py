"""Features of a data set: what is replaced, what is encoded, what the notes say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hellm.data import DataError, load_dataset, save_dataset, write_sample_shop
from hellm.features import add_features, choose_encoders, encode_text
from hellm.features.image import load_image_encoder
from hellm.features.text import load_text_encoder

transformers = pytest.importorskip("transformers", reason='needs pip install "hellm[encoders]"')


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = write_sample_shop(tmp_path_factory.mktemp("data") / "shop", num_users=30, num_items=20, num_groups=1)
    return load_dataset(folder)


class TestDatasets:
    def test_features_are_replaced_and_the_rest_stays(self, shop, text_encoder, image_encoder):
        made = add_features(shop, text=text_encoder, image=image_encoder)
        assert {name: one.values.shape for name, one in made.item_features.items()} == {
            "image": (20, 8),
            "text": (20, 8),
        }
        with_picture = [bool(path) for path in shop.item_fields["image"]]
        assert made.item_features["image"].mask.tolist() == with_picture
        np.testing.assert_array_equal(made.items, shop.items)
        assert made.item_titles == shop.item_titles
        assert shop.item_features["text"].values.shape[1] == 512

    def test_keys_of_the_weights_are_noted(self, shop, text_encoder, image_encoder):
        made = add_features(shop, text=text_encoder, image=image_encoder)
        assert made.encoders["text"]["key"] == load_text_encoder(text_encoder).key
        assert made.encoders["image"]["key"] == load_image_encoder(image_encoder).key

    def test_text_is_title_brand_category_and_description(self, shop, text_encoder):
        fields = {"brand": ["long"] * 20, "category": ["mug"] * 20, "description": ["a lamp"] * 20}
        plain = dataclasses.replace(shop, item_titles=["red"] * 20, item_fields=fields, item_features={})
        made = add_features(plain, text=text_encoder)
        expected = encode_text(["red long mug a lamp"], encoder=text_encoder).values[0]
        np.testing.assert_allclose(made.item_features["text"].values[7], expected, atol=1e-6)
        assert list(made.item_features) == ["text"]

    def test_text_of_chosen_fields_stands_beside_that_of_another_encoder(self, shop, text_encoder):
        fields = {"brand": ["long"] * 20, "category": ["mug"] * 20}
        plain = dataclasses.replace(shop, item_titles=["red"] * 20, item_fields=fields, item_features={})
        made = add_features(plain, text=text_encoder)
        both = add_features(made, text=text_encoder, text_name="brand", text_fields=("brand", "title"))
        expected = encode_text(["red long"], encoder=text_encoder).values[0]
        np.testing.assert_allclose(both.item_features["brand"].values[7], expected, atol=1e-6)
        assert both.item_features["text"] is made.item_features["text"]
        assert [note.split(" ")[0] for note in both.notes if "by encoder" in note] == ["text", "brand"]

    def test_text_fields_are_known_ones(self, shop, text_encoder):
        with pytest.raises(
            ValueError, match="text fields must be among title, brand, category, description, got colour"
        ):
            add_features(shop, text=text_encoder, text_fields=("colour",))

    def test_none_leaves_features_alone(self, shop, text_encoder):
        made = add_features(shop, text=text_encoder, image=None)
        assert made.item_features["image"] is shop.item_features["image"]

    def test_unreadable_pictures_are_in_the_notes(self, shop, image_encoder, tmp_path, caplog):
        (tmp_path / "torn.png").write_bytes(b"no picture")
        paths = [str(tmp_path / "torn.png"), *shop.item_fields["image"][1:]]
        torn = dataclasses.replace(shop, item_fields={**shop.item_fields, "image": paths})
        made = add_features(torn, text=None, image=image_encoder)
        assert not made.item_features["image"].mask[0]
        assert made.notes[-1].startswith("1 pictures cannot be read and count as missing: torn.png (cannot identify")
        assert made.notes[-1] in caplog.text

    def test_notes_name_the_encoder_once(self, shop, text_encoder):
        made = add_features(add_features(shop, text=text_encoder, image=None), text=text_encoder, image=None)
        assert [note for note in made.notes if "encoder" in note] == [f"text features are by encoder {text_encoder!r}"]

    def test_saved_and_loaded(self, shop, text_encoder, tmp_path):
        made = add_features(shop, text=text_encoder, image=None)
        loaded = load_dataset(save_dataset(made, tmp_path / "built"))
        np.testing.assert_array_equal(loaded.item_features["text"].values, made.item_features["text"].values)
        again = add_features(loaded, text=text_encoder, image=None)
        assert again.fingerprint == made.fingerprint

    def test_encoders_are_chosen_by_what_there_is(self, shop):
        assert choose_encoders(shop) == {"text": "minilm", "image": "efficientnet"}
        assert choose_encoders(shop, text=None, image="some/model") == {"image": "some/model"}
        blind = dataclasses.replace(shop, item_fields={})
        assert choose_encoders(blind) == {"text": "minilm"}

    def test_nothing_to_encode(self, shop):
        bare = dataclasses.replace(shop, item_titles=None, item_fields={"image_url": ["http://picture"] * 20})
        with pytest.raises(DataError, match="'shop' leaves nothing to encode: its items have neither text nor image"):
            add_features(bare)
        with pytest.raises(
            DataError, match=r"has no titles, brands, .* of items, so there is nothing for text encoder 'x'"
        ):
            add_features(bare, text="x")
        with pytest.raises(
            DataError, match=r"has no picture files of items \(only web addresses, which are not fetched\), so there is"
        ):
            add_features(bare, image="x")
