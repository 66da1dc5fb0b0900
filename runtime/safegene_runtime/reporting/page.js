"use strict";
(() => {
  const table = document.getElementById("prompt-table");
  const controls = document.getElementById("controls");
  if (!table || !controls) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => ({
    row,
    text: Array.from(row.cells, (cell) => (cell.querySelector("details") ? "" : cell.textContent))
      .join(" ")
      .toLowerCase(),
  }));
  const shown = document.getElementById("shown");
  const value = (id) => (document.getElementById(id) || { value: "all" }).value;

  const filter = () => {
    const words = value("search").toLowerCase().split(/\s+/).filter(Boolean);
    const [outcome, kind, attack] = ["outcome", "kind", "attack"].map(value);
    let count = 0;
    for (const { row, text } of rows) {
      const { change, kind: ofKind, attack: ofAttack } = row.dataset;
      const keep =
        (outcome === "all" || change === outcome || (outcome === "changed" && change !== "same")) &&
        (kind === "all" || ofKind === kind) &&
        (attack === "all" || ofAttack === attack) &&
        words.every((word) => text.includes(word));
      row.hidden = !keep;
      count += keep;
    }
    shown.textContent = `${count} of ${rows.length} prompts`;
  };

  const key = (row, column) => {
    const cell = row.cells[column];
    if (!cell.classList.contains("number")) return cell.textContent;
    return "value" in cell.dataset ? Number(cell.dataset.value) : -Infinity;
  };
  const compare = (a, b) =>
    typeof a === "number" ? (a === b ? 0 : a < b ? -1 : 1) : a.localeCompare(b, "en", { numeric: true });
  const heads = Array.from(table.tHead.rows[0].cells);
  const sort = (column) => {
    const head = heads[column];
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const sorted = Array.from(body.rows).sort((a, b) => sign * compare(key(a, column), key(b, column)));
    body.append(...sorted);
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(column));
    head.replaceChildren(button);
  });

  controls.addEventListener("input", filter);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = false;
  filter(); // a browser may have kept what was typed before a reload
})();
