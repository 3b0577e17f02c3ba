"use strict";
// Tables sort by a column's button: numbers by value, texts by letters, what was not measured last.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = head.classList.contains("n");
      const key = (row) => {
        const cell = row.cells[column];
        if (!cell || cell.colSpan > 1) return undefined;
        const value = cell.querySelector("data")?.value;
        if (numeric) return value === "NaN" ? undefined : value;
        return cell.textContent === "–" ? undefined : cell.textContent;
      };
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
// Paper shows what is folded on the screen, but for the figures of pictures.
const folded = () => document.querySelectorAll("details.group:not([open])");
let opened = [];
addEventListener("beforeprint", () => { opened = [...folded()]; for (const d of opened) d.open = true; });
addEventListener("afterprint", () => { for (const d of opened) d.open = false; });
