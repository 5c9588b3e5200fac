// Without this script everything is there to read; with it tables sort, lists filter, and code copies.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.textContent || !table.tBodies[0].rows[0].cells[column].dataset.key) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = table.tBodies[0].rows[0].cells[column].matches(".number, .chart");
      const last = head.getAttribute("aria-sort");
      const down = last ? last === "ascending" : numeric;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const text = row.cells[column].dataset.key;
        return numeric ? Number(text.replace("inf", "Infinity")) : text;
      };
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (down ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}

for (const box of document.querySelectorAll(".filter")) {
  const input = box.querySelector("input");
  const shown = box.querySelector("output");
  const groups = [...document.getElementById(input.getAttribute("aria-controls")).children];
  box.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let sites = 0;
    for (const group of groups) {
      const head = group.dataset.text;
      let found = 0;
      for (const item of group.querySelectorAll("li")) {
        const text = head + " " + item.textContent.toLowerCase();
        item.hidden = !words.every((word) => text.includes(word));
        found += !item.hidden;
      }
      group.hidden = !found;
      sites += found;
    }
    shown.textContent = words.length ? `${sites} of ${box.dataset.total} sites` : "";
  });
}

for (const figure of document.querySelectorAll("figure.code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  figure.querySelector("figcaption").append(button);
  button.addEventListener("click", async () => {
    const code = figure.querySelector("code");
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    // A page opened from disk may have no clipboard; then the lines stay selected, ready for Ctrl+C.
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

// On paper nothing opens on a click; lists of hundreds of sites stay closed.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open ||= part.querySelectorAll("li, tr").length <= 100;
});
