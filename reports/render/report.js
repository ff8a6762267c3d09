// Replaces each static image with a live chart, and adds sorting and filtering to tables.
// Without this script the page shows the static images and the complete tables.
(() => {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const config = read("config");
  for (const figure of document.querySelectorAll("figure[data-spec]")) {
    const still = figure.querySelector("img");
    const chart = document.createElement("div");
    chart.className = "chart";
    still.before(chart);
    const columns = Math.max(1, Math.floor(chart.clientWidth / 230));
    const own = read(figure.dataset.spec);
    const width = { width: "container", autosize: { type: "fit-x", contains: "padding" } };
    const spec = figure.classList.contains("live") ? { ...own, ...width } : own;
    const options = {
      actions: false,
      ast: true, // Interpret expressions: the page's policy forbids eval.
      config: { ...config, legend: { ...config.legend, columns } },
      defaultStyle: false,
      renderer: "svg",
      tooltip: { disableDefaultStyle: true },
    };
    vegaEmbed(chart, spec, options).then(
      () => still.remove(),
      (error) => {
        chart.remove();
        console.error(error);
      },
    );
  }

  const collator = new Intl.Collator("en", { numeric: true });
  const sortValue = (cell) => (cell.dataset.sortValue === undefined ? null : Number(cell.dataset.sortValue));
  // Numbers by value, then texts alphabetically; missing values stay last in both directions.
  const compare = (one, other, sign) => {
    const [a, b] = [sortValue(one), sortValue(other)];
    if (a !== null && b !== null) return sign * (a - b);
    if (a !== null || b !== null) return a === null ? 1 : -1;
    return sign * collator.compare(one.textContent, other.textContent);
  };

  const sort = (table, heading) => {
    const index = heading.cellIndex;
    const downwards = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", downwards ? "descending" : "ascending");
    const [body] = table.tBodies;
    const sign = downwards ? -1 : 1;
    body.append(...[...body.rows].sort((one, other) => compare(one.cells[index], other.cells[index], sign)));
  };

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    for (const heading of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sort(table, heading));
      heading.append(button);
    }
  }

  for (const table of document.querySelectorAll("table[data-chosen-by]")) {
    const index = Number(table.dataset.chosenBy);
    const rows = [...table.tBodies[0].rows];
    const name = table.tHead.rows[0].cells[index].textContent;
    const select = document.createElement("select");
    const values = new Set(rows.map((row) => row.cells[index].textContent));
    select.append(new Option(`every ${name}`, ""), ...[...values].map((value) => new Option(value)));
    select.addEventListener("change", () => {
      for (const row of rows) row.hidden = select.value !== "" && row.cells[index].textContent !== select.value;
    });
    const label = document.createElement("label");
    label.className = "choose";
    label.append(`Show ${name} `, select);
    table.parentElement.before(label);
  }
})();
