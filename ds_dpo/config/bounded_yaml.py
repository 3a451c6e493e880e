"""A loader of YAML whose documents may hold no more than a stated number of values, aliases written out."""

from __future__ import annotations

from typing import Any

import yaml

# A configuration has hundreds of values, a list of prompts some thousands. Python reads 2,500 a second on a busy core.
MAX_VALUES = 20_000


class BoundedLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a document while its nodes are composed, before aliases become values."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._num_begun = 0  # nodes, each of which has an event of its own
        self._sizes: dict[int, int] = {}  # of each complete node: its values with those of its children

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, and count the values of what it holds. Raises ComposerError for too many of them."""
        is_alias = self.check_event(yaml.AliasEvent)
        event = self.peek_event()
        self._num_begun += 1
        self._require_few(self._num_begun, event)  # before a parent is complete, which a long list never is
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias refers to what it is a part of", event.start_mark)
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
        self._require_few(self._sizes[id(node)], event)
        return node

    def _require_few(self, num_values: int, event: Any) -> None:
        if num_values > MAX_VALUES:
            problem = f"it holds more than {MAX_VALUES} values, with its aliases written out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
