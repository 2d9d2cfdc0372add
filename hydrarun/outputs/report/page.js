
"use strict";
const $ = (id) => document.getElementById(id);

// sorting: numerically if possible, empty cells last; a second click reverses the order
const value = (row, place) => {
  const cell = row.cells[place];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
};
const order = new Intl.Collator(undefined, { numeric: true }).compare;
for (const head of document.querySelectorAll(".numbers thead tr:last-child th")) {
  head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", place = head.cellIndex;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0];
    body.append(...[...body.rows].sort((one, two) => {
      const a = value(one, place), b = value(two, place);
      if (a === "" || b === "") return (a === "") - (b === "");
      const compared = typeof a === "number" && typeof b === "number" ? a - b : order(String(a), String(b));
      return up ? compared : -compared;
    }));
  });
}

// copying: the command next to the button
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentNode.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// the full view: a cell side by side with its reference, with a slider, or their difference
const view = $("view"), stage = $("view-stage"), slider = $("view-slider");
const cells = [...document.querySelectorAll(".grid figure")];
let current = 0;

const framed = (cell) => {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  caption.textContent = cell.dataset.name;
  figure.append(medium(cell), caption);
  return figure;
};
const medium = (cell) => still(cell, cell.querySelector("video") ? "video" : ".picture");
const still = (cell, kind) => {
  const copy = cell.querySelector(kind).cloneNode();
  copy.removeAttribute("class");
  return copy;
};

function show() {
  const cell = cells[current], reference = $(cell.dataset.reference), difference = cell.querySelector(".difference");
  for (const [mode, possible] of [["slider", reference], ["difference", difference]]) $("mode-" + mode).disabled = !possible;
  if (document.querySelector("[name=mode]:checked").disabled) $("mode-side").checked = true;
  const mode = document.querySelector("[name=mode]:checked").value;
  slider.hidden = mode !== "slider";
  const [width, height] = cell.dataset.size.split("×");
  stage.style.setProperty("--shape", width / height);
  if (mode === "slider") {
    const stack = document.createElement("div");
    stack.className = "stack";
    stack.append(still(cell, ".picture"), still(reference, ".picture"), document.createElement("i"));
    stage.replaceChildren(stack);
    slide();
  } else if (mode === "difference") {
    stage.replaceChildren(still(cell, ".difference"));
  } else {
    stage.replaceChildren(...[reference, cell].filter(Boolean).map(framed));
  }
  for (const video of stage.querySelectorAll("video")) video.play();
  $("view-name").textContent = (mode === "slider" ? reference.dataset.name + " | " : "") + cell.dataset.name;
  const link = cell.querySelector("a").cloneNode();
  link.textContent = "the file itself, " + cell.dataset.size;
  const told = [...cell.querySelectorAll("figcaption span"), { textContent: cell.dataset.difference || "" }];
  $("view-told").replaceChildren(told.map((part) => part.textContent).filter(Boolean).join(" · ") + " · ", link);
  const command = $("command-" + cell.dataset.point);
  view.querySelector(".command").hidden = !command;
  $("view-command").textContent = command ? command.querySelector("code").textContent : "";
}
const slide = () => {
  stage.querySelector("img + img").style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`;
  stage.querySelector("i").style.left = slider.value + "%";
};
const go = (step) => { current = (current + step + cells.length) % cells.length; show(); };

cells.forEach((cell, place) => {
  const open = (event) => { event.preventDefault(); current = place; show(); view.showModal(); };
  cell.querySelector("a").addEventListener("click", open);
});
for (const mode of document.querySelectorAll("[name=mode]")) mode.addEventListener("change", show);
slider.addEventListener("input", slide);
$("view-before").addEventListener("click", () => go(-1));
$("view-after").addEventListener("click", () => go(1));
$("view-close").addEventListener("click", () => view.close());
view.addEventListener("close", () => stage.replaceChildren());
view.addEventListener("keydown", (event) => {
  if (event.target.type === "range" || event.target.type === "radio") return;
  if (event.key === "ArrowLeft") go(-1);
  if (event.key === "ArrowRight") go(1);
});
