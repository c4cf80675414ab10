"""What people call things, from packages in the sources' own layout."""

import dataclasses

import pytest
import torch
from wordnet import write_words

from unclip.data.emoji import NAMES
from unclip.data.words import (
    KEYWORDS,
    WORDNET,
    EmojiFacts,
    load_words,
    pseudo_label,
    read_vocabulary,
    save_words,
    wordnet_phrases,
)

CAT, CAKE = "\U0001f408", "\U0001f370"


def read(npm, **concepts):
    paths = [npm / "-".join(p) for p in (WORDNET, KEYWORDS, NAMES)]
    return read_vocabulary(*paths, {name.replace("_", " "): named for name, named in concepts.items()})


def test_a_concept_has_its_synonyms_kinds_and_what_it_is(tmp_path):
    nouns = [
        'true_cat cat 05 >house_cat >lion | a feline (small) with soft fur; "the cat is in"',
        "cat#2 18 | a spiteful woman gossip",
        "house_cat Felis_catus 05 >tabby | a cat that is kept, ",
        "tabby 05 | a cat with stripes",
        "lion 05 >cub | a big cat",
        "cub 05 | a young lion",
    ]
    write_words(tmp_path, nouns, {CAT: ["meow", "genus_cat", "42", "cat"]}, codes={"1F408": ["cat2", "pussy-cat"]})
    found = read(tmp_path, cat=EmojiFacts(CAT, ["pet"], "animals-nature"), lion=EmojiFacts("?", [], "animals-nature")).of
    assert found["cat"].names == ["meow", "pussy cat", "true cat"]
    assert found["cat"].narrower == ["house cat", "tabby"]  # the lion and its cub are another emoji's
    assert found["cat"].sayings == ["feline with soft fur", "cat that is kept"]
    assert found["lion"].names == [] and found["lion"].narrower == ["cub"]


@pytest.mark.parametrize(("tags", "sense"), [(["sweet", "candles"], "baked with candles"), (["soap"], "block of soap")])
def test_tags_choose_the_sense(tmp_path, tags, sense):
    write_words(tmp_path, ["cake bar 06 | a block of soap", "cake#2 gateau 06 | baked with candles", "act 04 | soap"], {})
    found = read(tmp_path, cake=EmojiFacts(CAKE, tags, "objects"), act=EmojiFacts("?", ["soap"], "objects")).of
    assert found["cake"].sayings == [sense]
    assert "act" not in found  # what one does is not an object


def test_faces_have_their_moods_as_names(tmp_path):
    moods = ["angry 00 &furious &mad(p) | feeling anger", "furious raging 00 | very angry", "mad(p) 00 | angry"]
    write_words(tmp_path, [], {}, {"adj": moods})
    found = read(
        tmp_path, angry_face=EmojiFacts("?", [], "smileys-emotion"), angry_bird=EmojiFacts("?", [], "animals-nature")
    ).of
    assert found["angry face"].names == ["angry", "furious", "raging", "mad"] and "angry bird" not in found


def test_shared_keywords_are_dropped_and_long_definitions_end_at_a_clause(tmp_path):
    long = "a thing of many parts, each of which is described here at length, and the last of them once more"
    write_words(tmp_path, [f"gadget 06 | {long}"], {str(n): ["thing", f"only {n}"] for n in range(7)} | {CAT: ["thing"]})
    found = read(
        tmp_path, gadget=EmojiFacts(CAT, [], "objects"), **{f"c{n}": EmojiFacts(str(n), [], "objects") for n in range(7)}
    ).of
    assert found["gadget"].sayings == ["thing of many parts, each of which is described here at length"]
    assert found["gadget"].names == [] and "c3" not in found


def test_common_words_that_name_no_concept_are_context(tmp_path):
    nouns = ["meadow%1 4", "meadow%1 2", "cat%1 40", "house%1 9", "new_york%1 9"]
    used = [*nouns, "rare%3 4", "fluffy%3 3", "fluffy%5 3", "run%2 90"]
    write_words(tmp_path, ["cat house_cat 05 | a pet"], {}, used=used)
    found = read(tmp_path, cat=EmojiFacts(CAT, [], "animals-nature"))
    assert (found.nouns, found.adjectives) == (["meadow"], ["fluffy"])  # a house cat is a cat


def test_phrases_are_assigned_to_the_most_similar_concept(tmp_path):
    nouns = ["cat 05 | a pet", "catkin 20 | a spike", "cake 13 | a dish"]
    adjectives = ['sweet 00 | like a cake; "the cake is a cake"']
    write_words(tmp_path, nouns, {CAKE: ["tart"]}, {"adj": adjectives, "verb": ["eat_cake 34 | dine"]})
    wordnet = tmp_path / "-".join(WORDNET)
    phrases = wordnet_phrases(wordnet)
    assert phrases == ["cat", "pet", "cake", "dine", "dish", "spike", "catkin", "eat cake", "like a cake", "the cake is a cake"]
    known = ["cat", "cake", "tart", "pet", "dish"]

    def encode(texts):  # how often each known word comes; a text of none of them is like nothing
        return torch.tensor([[float(t.replace(",", "").replace(":", "").split().count(k)) for k in known] for t in texts])

    words = read(tmp_path, cat=EmojiFacts(CAT, [], "animals-nature"), cake=EmojiFacts(CAKE, ["dish"], "food-drink"))
    heard = pseudo_label(words, {"cat": [], "cake": ["dish"]}, [phrases[:4], phrases[4:]], encode)
    assert heard.of["cat"].heard == ["cat"]  # a pet is not called one here
    assert heard.of["cake"].heard == ["cake", "eat cake", "like a cake", "the cake is a cake"]  # and not "dish", at .35
    assert {c: dataclasses.replace(w, heard=[]) for c, w in heard.of.items()} == words.of
    assert pseudo_label(heard, {"cat": [], "cake": ["dish"]}, [phrases], encode) == heard  # in any batches, and once more
    save_words(heard, tmp_path / "words.json.gz")
    assert load_words(tmp_path / "words.json.gz") == heard
