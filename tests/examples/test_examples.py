# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Examples that need no server; ``tests/test_serve.py`` runs those that do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.examples import EXAMPLES, example

MONITORING = EXAMPLES / "monitoring"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_says_how_it_is_run(path):
    assert f"python examples/{path.name} " in path.read_text()


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("backend", "settings"), [("ROCKETKV", {"token_budget": 512}), ("SPARDA", {"host_gib": 0.1})]
)
def test_offline_asks_vllm_for_what_it_accepts(
    llama, tmp_path, monkeypatch, capsys, backend, settings
):
    vllm = pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs

    built = []

    class Recorder:
        """Checks the options as an engine does, and answers without one."""

        def __init__(self, **options):
            built.append(EngineArgs(**options).create_engine_config())

        def chat(self, conversations, sampling):
            return [SimpleNamespace(outputs=[SimpleNamespace(text=f" {len(part[0]['content'])}")])
                    for part in conversations]  # fmt: skip

    monkeypatch.setattr(vllm, "LLM", Recorder)
    documents = [tmp_path / "a.md", tmp_path / "b.md"]
    for path in documents:
        path.write_text("word " * 100)
    example("offline").main(
        [str(llama), *map(str, documents), "--backend", backend, "--settings", json.dumps(settings)]
    )
    (config,) = built
    assert config.attention_config.backend.name == backend
    assert config.additional_config == {"vllm_sparse": settings}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines[-2:]] == list(map(str, documents))


class TestMonitoring:
    compose = yaml.safe_load((MONITORING / "compose.yml").read_text())

    def test_what_is_mounted_exists(self):
        for service in self.compose["services"].values():
            for volume in service.get("volumes", []):
                source = volume.split(":")[0]
                assert source in self.compose["volumes"] or (MONITORING / source).exists(), source

    def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus(self):
        services = self.compose["services"]
        (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
        host, port = job["static_configs"][0]["targets"][0].split(":")
        assert f"{port}:{port}" in services[host]["ports"]
        (source,) = yaml.safe_load((MONITORING / "grafana/datasources.yml").read_text())[
            "datasources"
        ]
        assert source["url"].removeprefix("http://").split(":")[0] in services

    def test_the_dashboard_is_where_grafana_looks(self):
        grafana = self.compose["services"]["grafana"]
        inside = {volume.split(":")[1]: volume.split(":")[0] for volume in grafana["volumes"]}
        home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        assert json.loads((MONITORING / inside[home]).read_text())["panels"]
        (provider,) = yaml.safe_load((MONITORING / "grafana/dashboards.yml").read_text())[
            "providers"
        ]
        assert provider["options"]["path"] == str(Path(home).parent)

    def test_the_server_is_our_image_with_our_backend(self):
        server = self.compose["services"]["vllm"]
        assert (MONITORING / server["build"] / "Dockerfile").exists()
        assert server["command"][1:] == ["--attention-backend", "ROCKETKV"]
        assert server["environment"] == ["HF_TOKEN"]

    def test_models_are_kept_where_the_image_s_user_may_write(self):
        """vLLM's image has a user of this name, whose number is its own."""
        image = (EXAMPLES.parent / "Dockerfile").read_text()
        (volume,) = self.compose["services"]["vllm"]["volumes"]
        folder = volume.split(":")[1]
        made, _, after = image.partition("USER vllm\n")
        assert after
        assert "--uid" not in image
        assert "id vllm >/dev/null 2>&1 || useradd" in made
        assert f"mkdir -p {folder} && chown -R vllm /home/vllm" in made
        assert f"-v {volume} " in image
        assert "vllm-sparse MODEL --attention-backend" in image

    def test_prometheus_loads_the_alerts(self):
        (rules,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["rule_files"]
        inside = [
            volume.split(":")[1] for volume in self.compose["services"]["prometheus"]["volumes"]
        ]
        assert f"/etc/prometheus/{rules}" in inside
