"""Why: a run's texts are written into pages, where they must not act as HTML. Not covered: how pages look."""

import pytest

from megatron_fipo.tracking.page import Chart, Line, chart_scripts, draw_charts, in_script, page


def test_nothing_in_a_title_or_a_value_becomes_markup():
    text = page("<b>run</b>", "<p>body</p>", ["let value = " + in_script("</script><b>\u2028") + ";\n"])
    assert "<b>" not in text and "&lt;b&gt;run" in text and "<p>body</p>" in text
    assert text.count("</script") == 1 and "\u2028" not in text


def test_a_value_that_json_lacks_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        in_script(float("nan"))


def test_charts_come_with_the_library_and_fetch_nothing():
    plotly, own = chart_scripts()
    assert "plotly.js v" in plotly[:200] and "</script" not in plotly and "</script" not in own
    script = draw_charts("plots", [Chart("Reward", "reward", [Line("mean", [1, 2], [0.5, None])])])
    assert '"plots"' in script and '"y":[0.5,null]' in script
    assert "http" not in page("run", "", [own, script])
