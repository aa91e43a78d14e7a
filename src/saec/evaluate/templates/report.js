"use strict";
// The page reads without this file; it adds filters, overlays on demand and an enlarged view.
(() => {
  const PAGE = 24;
  const find = (selector) => document.querySelector(selector);
  const parts = [...document.querySelectorAll(".part[data-flags]")];
  const dialog = find("#large");
  let limit = PAGE, matching = parts, open = 0;

  for (const hidden of document.querySelectorAll(".js[hidden]")) hidden.hidden = false;

  const show = () => {
    const wanted = find('[data-filter][aria-pressed="true"]').dataset.filter;
    const product = find("#product") ? find("#product").value : "";
    matching = parts.filter((part) =>
      (!wanted || part.dataset.flags.split(" ").includes(wanted)) && (!product || part.dataset.product === product));
    const shown = new Set(matching.slice(0, limit));
    for (const part of parts) part.hidden = !shown.has(part);
    find("#more").parentElement.hidden = shown.size === matching.length;
    find("#more").textContent = `Show ${Math.min(PAGE, matching.length - shown.size)} more`;
    find(".count").textContent = `${shown.size} of ${matching.length} shown`;
  };
  const toggle = (name) => {
    const on = document.body.classList.toggle(name);
    for (const button of document.querySelectorAll(`[data-toggle="${name}"]`)) button.setAttribute("aria-pressed", on);
  };

  for (const button of document.querySelectorAll("[data-filter]")) {
    button.addEventListener("click", () => {
      for (const other of document.querySelectorAll("[data-filter]")) other.setAttribute("aria-pressed", other === button);
      limit = PAGE;
      show();
    });
  }
  if (find("#product")) find("#product").addEventListener("change", () => { limit = PAGE; show(); });
  find("#more").addEventListener("click", () => { limit += PAGE; show(); });
  for (const button of document.querySelectorAll("[data-toggle]")) {
    button.addEventListener("click", () => toggle(button.dataset.toggle));
  }

  const enlarge = (index) => {
    open = (index + matching.length) % matching.length;
    dialog.querySelector(".body").replaceChildren(...[...matching[open].children].map((child) => child.cloneNode(true)));
    dialog.querySelector(".view").removeAttribute("tabindex");
    dialog.querySelector(".view").removeAttribute("role");
    if (!dialog.open) dialog.showModal();
  };
  for (const part of parts) {
    const view = part.querySelector(".view[tabindex]");
    if (!view) continue;
    view.addEventListener("click", () => enlarge(matching.indexOf(part)));
    view.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      enlarge(matching.indexOf(part));
    });
  }
  dialog.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button && button.dataset.step) enlarge(open + Number(button.dataset.step));
    else if (event.target === dialog || (button && "close" in button.dataset)) dialog.close();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "h" || event.key === "H") toggle("show-heat");
    if (event.key === "b" || event.key === "B") toggle("show-boxes");
    if (dialog.open && event.key === "ArrowRight") enlarge(open + 1);
    if (dialog.open && event.key === "ArrowLeft") enlarge(open - 1);
  });
  window.addEventListener("beforeprint", () => { for (const more of document.querySelectorAll("details")) more.open = true; });
  show();
})();
