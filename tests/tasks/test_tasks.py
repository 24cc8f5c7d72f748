"""classify, answer, rank: what they compute, and what they refuse."""

import json

import numpy as np
import pytest
import torch

from minivlm2vec.errors import InputError
from minivlm2vec.prompts import TASKS, Task
from minivlm2vec.tasks import Classifier, answer, classify, rank

LABELS = ["animals & nature", "food & drink", "travel & places", "flags", "objects", "symbols"]


class Recorder:
    """An encoder that notes what it is asked."""

    def __init__(self, encoder):
        self.encoder, self.calls = encoder, []

    def encode(self, inputs, **options):
        self.calls.append((list(inputs), options))
        return self.encoder.encode(inputs, **options)


def test_classify_is_cosines_and_their_softmax_at_the_training_temperature(mini, emoji):
    found = classify(mini, emoji, LABELS, top=None)
    queries, labels = mini.encode_query(emoji, prompt_name="classify"), mini.encode(LABELS)
    cosines = queries @ labels.T
    for one, row in zip(found, cosines, strict=True):
        scores = {label.index: label.score for label in one.labels}
        np.testing.assert_allclose([scores[i] for i in range(6)], row, atol=1e-6)
        expected = torch.softmax(torch.tensor(row) / 0.02, 0).numpy()
        by_index = {label.index: label.probability for label in one.labels}
        np.testing.assert_allclose([by_index[i] for i in range(6)], expected, atol=1e-4)
        assert one.label == LABELS[row.argmax()] and [x.score for x in one.labels] == sorted(scores.values())[::-1]


def test_a_classifier_embeds_its_labels_once(mini, emoji):
    recorder = Recorder(mini)
    classifier = Classifier(recorder, LABELS)
    first, second = classifier(emoji[:2]), classifier(emoji[2:])
    assert [len(inputs) for inputs, _ in recorder.calls] == [6, 2, 4]
    assert [x.label for x in first + second] == [x.label for x in classify(mini, emoji, LABELS)]
    assert classifier(emoji[0]) == first[0] and classifier([]) == []
    assert classifier.scores(emoji).shape == (6, 6)


def test_templates_are_averaged(mini, emoji):
    templates = ["{}", "a picture of {}", "{} and nothing but {}"]
    classifier = Classifier(mini, LABELS, template=templates)
    texts = [[t.replace("{}", label) for label in LABELS] for t in templates]
    mean = np.mean([mini.encode(one) for one in texts], axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(classifier.vectors, mean, atol=1e-6)
    assert not np.allclose(classifier.vectors, Classifier(mini, LABELS).vectors, atol=1e-3)


def test_answer_asks_one_question_or_many(mini, picture):
    image, corners = picture("Grid-Where/image_0.webp"), ["wolf", "feather", "SOON arrow", "hibiscus"]
    questions = ["what is in the top left corner?", "what is in the bottom left corner?"]
    many = answer(mini, image, questions, corners)
    assert [x.question for x in many] == questions and [len(x.choices) for x in many] == [4, 4]
    one = answer(mini, image, questions[1], corners)
    assert one.choice == many[1].choice and one.score == pytest.approx(many[1].score, abs=1e-6)
    scores = mini.encode_query([{"image": image, "text": questions[1]}], prompt_name="vqa") @ mini.encode(corners).T
    assert one.score == pytest.approx(scores.max(), abs=1e-6)
    own = answer(mini, image, questions, [corners, corners[:2]], top=1)
    assert [x.of for x in own] == [4, 2] and own[0].choice == many[0].choice


def test_rank_takes_text_image_or_both_on_either_side(mini, emoji):
    candidates = [emoji[0], "a text", {"text": "about it", "image": emoji[1]}, {"image": emoji[2]}]
    found = rank(mini, "a flag", candidates)
    document = TASKS["t2i"].document
    pictures = mini.encode([emoji[0], candidates[2], emoji[2]], prompt=document)
    text = mini.encode(["a text"])[0]  # no image, no instruction about one
    query = mini.encode_query(["a flag"], prompt_name="t2i")[0]
    scores = {0: pictures[0] @ query, 1: text @ query, 2: pictures[1] @ query, 3: pictures[2] @ query}
    assert [hit.index for hit in found.hits] == sorted(scores, key=lambda i: -scores[i])
    for hit in found.hits:
        assert hit.score == pytest.approx(scores[hit.index], abs=1e-6)
    texts = rank(mini, {"image": emoji[0], "text": ""}, ["a", "b"], instruction="i2t", top=1)
    assert texts.of == 2 and len(texts.hits) == 1


def test_the_rank_of_a_known_right_one_counts_ties_against_it_but_not_itself_again(mini):
    class Fixed:
        def encode(self, inputs, prompt=None):
            return np.array([{"q": [1, 0], "x": [1, 0], "y": [1, 0], "z": [0, 1]}[i] for i in inputs], dtype=np.float32)

    found = rank(Fixed(), "q", ["z", "x", "y", "x"], instruction=None, right=1)
    assert found.right_rank == 2, "y ties; x again is the same input"
    assert [hit.index for hit in found.hits] == [1, 2, 3, 0], "equal ones in the order of the list"
    assert rank(Fixed(), "q", ["x", "z"], instruction=None, right=1).right_rank == 2


def test_results_print_and_convert(mini, emoji):
    one, asked = classify(mini, emoji[0], LABELS, top=2), answer(mini, emoji[0], "what is it?", ["a\x1b[31m", "b"])
    ranking = rank(mini, "a flag", emoji, right=3, top=2)
    for result in (one, asked, ranking):
        assert json.loads(json.dumps(result.as_dict())) == result.as_dict()
        assert "\x1b" not in str(result)
    assert one.label in str(one) and str(one).count("\n") == 2
    assert f"candidate 3 has rank {ranking.right_rank}" in str(ranking)
    assert one.rank_of(one.label) == 1
    with pytest.raises(ValueError, match="not among the 2 nearest of 6 labels"):
        one.rank_of("nothing")
    with pytest.raises(ValueError, match="last of the 2 nearest of 6"):
        one.rank_of(one.labels[1].text)


def test_own_instructions_and_captions(mini, emoji):
    own = Task("Look: {text}", "A {text}.")
    asked = classify(mini, [{"image": emoji[0], "text": "a caption"}], ["x", "y"], instruction=own, top=None)
    scores = mini.encode([{"image": emoji[0], "text": "Look: a caption"}]) @ mini.encode(["A x.", "A y."]).T
    assert asked[0].score == pytest.approx(scores.max(), abs=1e-6)


REFUSED = {
    "labels: none is given; 2 are needed at least, got 0": lambda e, x: classify(e, x, []),
    "labels: only 'a' is given; 2 are needed at least, got 1": lambda e, x: classify(e, x, ["a"]),
    "label 2: ' a' is label 0 too": lambda e, x: classify(e, x, ["a", "b", " a"]),
    "label 1: is empty: ''": lambda e, x: classify(e, x, ["a", ""]),
    r"label 1: is empty: ' \\t'": lambda e, x: classify(e, x, ["a", " \t"]),
    "labels: a list of texts is needed, got one text 'a,b'": lambda e, x: classify(e, x, "a,b"),
    "label 1: a text is needed, got int": lambda e, x: classify(e, x, ["a", 1]),
    "top is 0; at least 1 is needed": lambda e, x: classify(e, x, ["a", "b"], top=0),
    "top is 9; there are 2 labels": lambda e, x: classify(e, x, ["a", "b"], top=9),
    "template 'a' has no {} for the label": lambda e, x: classify(e, x, ["a", "b"], template="a"),
    "template is empty": lambda e, x: classify(e, x, ["a", "b"], template=[]),
    "instruction is 'classification'; there are classify,": lambda e, x: classify(
        e, x, ["a", "b"], instruction="classification"
    ),
    "image 1: is ''; a path": lambda e, x: classify(e, [x[0], ""], ["a", "b"]),
    "image 0: has no image": lambda e, x: classify(e, [{"text": "a"}], ["a", "b"]),
    "image 0: has no text, and the instruction 'Represent the given news": lambda e, x: classify(
        e, x, ["a", "b"], instruction="classify_news"
    ),
    "image 1 (nothing.jpg): no such file": lambda e, x: classify(e, [x[0], "nothing.jpg"], ["a", "b"]),
    "question: is empty: ' '": lambda e, x: answer(e, x[0], " ", ["a", "b"]),
    "questions: no question is given; 1 is needed at least, got 0": lambda e, x: answer(e, x[0], [], ["a", "b"]),
    "choices: a list of texts is needed, got one text 'yes'": lambda e, x: answer(e, x[0], "is it?", "yes"),
    "choices: none is given; 2 are needed at least, got 0": lambda e, x: answer(e, x[0], "is it?", []),
    "choice 0: is empty: ''": lambda e, x: answer(e, x[0], "is it?", ["", "a"]),
    "choice 1: 'a' is choice 0 too": lambda e, x: answer(e, x[0], "is it?", ["a", "a"]),
    "choices: 1 lists are given for 2 questions": lambda e, x: answer(e, x[0], ["a?", "b?"], [["a", "b"]]),
    "question 1, choices: only 'a' is given": lambda e, x: answer(e, x[0], ["a?", "b?"], [["a", "b"], ["a"]]),
    "top is 3; there are 2 choices": lambda e, x: answer(e, x[0], "is it?", ["a", "b"], top=3),
    "query: is empty: ''": lambda e, x: rank(e, "", x),
    "query: has no text, and the instruction 'Find me": lambda e, x: rank(e, {"image": x[0]}, ["a"]),
    "query (nothing.jpg): no such file": lambda e, x: rank(e, {"image": "nothing.jpg"}, ["a"], instruction="i2t"),
    "candidates: none is given; 1 is needed at least, got 0": lambda e, x: rank(e, "a", []),
    "candidates: a list of inputs is needed, got one str": lambda e, x: rank(e, "a", "b"),
    "candidate 1: is empty: ''": lambda e, x: rank(e, "a", ["b", ""]),
    "candidate 2 (nothing.jpg): no such file": lambda e, x: rank(e, "a", ["b", x[0], {"image": "nothing.jpg"}]),
    "top is 7; there are 6 candidates": lambda e, x: rank(e, "a", x, top=7),
    "right is 6; the 6 candidates have the numbers 0 to 5": lambda e, x: rank(e, "a", x, right=6),
    "right is 'a'; the index of a candidate is needed": lambda e, x: rank(e, "a", x, right="a"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_bad_input_is_named(mini, emoji, said):
    import re

    with pytest.raises(ValueError, match=re.escape(said) if "\\" not in said else said) as caught:
        REFUSED[said](mini, emoji)
    assert isinstance(caught.value, InputError) or type(caught.value).__name__ == "OptionError"


def test_nothing_is_computed_before_labels_images_and_choices_are_seen():
    class Never:
        def encode(self, *args, **options):
            raise AssertionError("encode was called")

    for said, refused in REFUSED.items():
        if "no such file" not in said:
            with pytest.raises(ValueError):
                refused(Never(), ["x.jpg"] * 6)
