from pathlib import Path

import pytest

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.config import substitution
from qlora_recipes.evaluate import score
from qlora_recipes.metrics import bertscore
from qlora_recipes.metrics.bertscore import DEFAULT, ScorerModel, is_recorded

PAIRS = [
    ("please fix this typo now", "fix this typo"),
    ("Why not use a constant here?", "I would use a constant."),
    ("nit: remove this blank line", "LGTM!"),
    ("x " * 900, "y"),
]


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random RoBERTa with a byte-level tokenizer, which tells a word at the start from one behind a space."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator([text for pair in PAIRS[:3] for text in pair] * 20, 400, special_tokens=special)
    tokenizer.save_model(str(folder))
    RobertaTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaModel(RobertaConfig(vocab_size=400, max_position_embeddings=514, **sizes)).save_pretrained(folder)
    return folder


def test_scores_are_the_librarys():
    from bert_score import BERTScorer

    folder = str(substitution.scorer_folder())
    library = BERTScorer(model_type=folder, num_layers=6, lang="en")
    short = PAIRS[:3]  # of a text beyond the model's context, the library would make an error
    expected = library.score([prediction for _, prediction in short], [reference for reference, _ in short])[2].tolist()
    judge = ScorerModel(model=folder, layer=6)
    scores, scorer_record = bertscore.f1(short, judge), bertscore.record(judge)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert scorer_record.hash == library.hash.replace(folder, "model")
    assert scorer_record.layer == 6


def test_empty_texts_score_nothing_and_change_nothing():
    judge = score.scorer_model(ScorerModel(), None, rehearsal=True)
    assert judge
    alone = bertscore.f1(PAIRS, judge)
    among = bertscore.f1([("", "a"), *PAIRS[:2], ("a", " \n"), *PAIRS[2:], ("", "")], judge)
    scorer_record = bertscore.record(judge)
    assert among[0] == 0
    assert among[3] == 0
    assert among[6] == 0
    assert among[1:3] + among[4:6] == pytest.approx(alone, abs=1e-6)
    assert scorer_record.model == "all-MiniLM-L6-v2"
    assert bertscore.f1([("a", "")], judge) == [0]


def test_a_roberta_gets_the_space_before_the_first_word_that_the_published_scores_had(roberta):
    """transformers 4 put it there when bert-score asked for it; 5 ignores the request."""
    import torch
    from bert_score.utils import get_bert_embedding, greedy_cos_idf
    from transformers import AutoTokenizer, RobertaModel

    tokenizer = AutoTokenizer.from_pretrained(roberta)
    model = RobertaModel.from_pretrained(roberta)
    model.encoder.layer = torch.nn.ModuleList(model.encoder.layer[:2])

    class Spaced:
        """The tokenizer with a space written before each text, after bert-score has stripped it."""

        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def encode(self, text: str, **more: object) -> list[int]:
            return tokenizer.encode(f" {text}", **more | {"max_length": 512})

    scorer = ScorerModel(model=str(roberta), layer=2)
    weights = dict.fromkeys(range(400), 1.0) | {tokenizer.cls_token_id: 0.0, tokenizer.sep_token_id: 0.0}
    for reference, prediction in PAIRS[:3]:
        sides = [
            get_bert_embedding([text], model.eval(), Spaced(), weights, device="cpu")
            for text in (reference, prediction)
        ]
        (ref, ref_mask, ref_idf), (hyp, hyp_mask, hyp_idf) = sides
        expected = greedy_cos_idf(ref, ref_mask, ref_idf, hyp, hyp_mask, hyp_idf)[2].item()
        assert bertscore.f1([(reference, prediction)], scorer)[0] == pytest.approx(expected, abs=1e-5)
    assert bertscore.f1(PAIRS, scorer)[3] > 0  # longer than its positions


def test_a_model_without_a_limit_of_positions_scores_long_texts(roberta, tmp_path):
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    AutoTokenizer.from_pretrained(roberta).save_pretrained(folder := tmp_path / "t5")
    sizes = {"vocab_size": 400, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(folder)
    assert all(bertscore.f1(PAIRS, ScorerModel(model=str(folder), layer=1)))


def test_a_missing_layer_or_model_is_reported():
    for layer in (None, 9):
        with pytest.raises(UserError, match="6 layers"):
            bertscore.f1(PAIRS, ScorerModel(model=str(substitution.scorer_folder()), layer=layer))
    with pytest.raises(WorkFailed, match=r"roberta-large .*--metric bertscore:none"):
        bertscore.f1(PAIRS, ScorerModel(model=DEFAULT))


def test_a_judge_is_told_by_its_weights_and_not_by_its_folders_name(roberta, tmp_path):
    judge = ScorerModel(model=str(roberta), layer=2)
    scorer_record = bertscore.record(judge)
    assert is_recorded(judge, scorer_record) and is_recorded(ScorerModel(model=str(roberta)), scorer_record)
    assert not is_recorded(ScorerModel(model=str(roberta), layer=1), scorer_record)
    other = tmp_path / roberta.name
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"others")
    assert not is_recorded(ScorerModel(model=str(other), layer=2), scorer_record)
    small_model = score.scorer_model(ScorerModel(), None, rehearsal=True)
    assert small_model and is_recorded(small_model, bertscore.record(small_model))


def test_the_judge_is_the_default_only_where_it_is_here(tmp_path, monkeypatch):
    assert score.scorer_model(ScorerModel(), None, rehearsal=False) is None
    assert score.scorer_model(ScorerModel(), "none", rehearsal=True) is None
    declared = ScorerModel(model="some/model", layer=3)
    assert score.scorer_model(declared, "some/model", rehearsal=False) == declared
    assert score.scorer_model(declared, "another/model", rehearsal=False) == ScorerModel(model="another/model")
    folder = tmp_path / "models--roberta-large"
    for name, content in (("refs/main", "abc"), ("snapshots/abc/config.json", "{}")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(content)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert score.scorer_model(ScorerModel(), None, rehearsal=False) == ScorerModel(model="roberta-large")
