import pytest

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import AttentionConfig, Selector
from phsa_megatron.evaluation.information_loss import swapped


def test_another_selector_keeps_the_runs_windows_and_has_its_own_lambda():
    own = AttentionConfig(init_tokens=32, dense_layers=[1])
    other = swapped(own, Selector.moba)
    assert (other.selector, other.init_tokens, other.mean_weight_frac) == (Selector.moba, 32, 1.0)
    assert swapped(own, Selector.phsa) is own
    assert swapped(AttentionConfig(selector=Selector.indexer), Selector.minmax).selector == Selector.minmax


@pytest.mark.parametrize(
    ("own", "other", "words"),
    [
        (Selector.phsa, Selector.indexer, "none of its weights; measure --selectors phsa"),
        (Selector.indexer, Selector.nsa, "none of its weights; measure --selectors indexer"),
        (Selector.nsa, Selector.phsa, "more than a choice of blocks; measure --selectors nsa"),
    ],
)
def test_a_selector_whose_weights_a_run_lacks_is_refused(own, other, words):
    with pytest.raises(ConfigError, match=words):
        swapped(AttentionConfig(selector=own), other)
