"use strict";
// Light and dark by hand, and which section is being read. The page is whole without it.
(function () {
  const root = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  // a page opened from a file may have no storage
  function stored(value) {
    try {
      if (value !== undefined) localStorage.setItem("croco-theme", value);
      return localStorage.getItem("croco-theme");
    } catch (error) {
      return null;
    }
  }
  function label() {
    const other = dark() ? "light" : "dark";
    button.lastChild.textContent = other === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", `Switch to ${other} colours`);
  }
  const kept = stored();
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  button.hidden = false;
  label();
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    stored(root.dataset.theme);
    label();
  });
  system.addEventListener("change", label);

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      const link = links.get(entry.target.id);
      link.setAttribute("aria-current", "true");
      const strip = link.parentElement;
      strip.scrollLeft = link.offsetLeft - strip.offsetLeft - strip.clientWidth / 2 + link.offsetWidth / 2;
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  for (const id of links.keys()) watch.observe(document.getElementById(id));
})();
