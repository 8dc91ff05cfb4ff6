/* Name what the console's own templates leave to the eye, and open its menu with the keyboard too.

   Select2 names its boxes by what is chosen, and its search fields not at all: give each the name of its field too. */
"use strict"
{
  const nameOf = (select) => select.labels?.[0]?.textContent.replace(":", "").trim() || select.getAttribute("aria-label") || ""

  function nameBox(box) {
    const select = box.previousElementSibling
    const chosen = box.querySelector(".select2-selection")
    if (!select?.matches("select") || !chosen || !nameOf(select)) return
    const search = box.querySelector(".select2-search__field")
    if (search) search.setAttribute("aria-label", nameOf(select))
    const value = box.querySelector(".select2-selection__rendered")
    chosen.id = `${select.id}-box`
    chosen.setAttribute("aria-label", nameOf(select))
    if (!value?.id) return
    // it is the box's value, no field of its own
    value.removeAttribute("role")
    chosen.setAttribute("aria-labelledby", `${chosen.id} ${value.id}`)
  }

  function nameOpened(opened) {
    const id = /^select2-(.+)-results$/.exec(opened.querySelector("[role=listbox]")?.id ?? "")?.[1]
    const select = id && document.getElementById(id)
    const search = opened.querySelector(".select2-search__field")
    if (select && search) search.setAttribute("aria-label", `Search ${nameOf(select)}`)
    if (select) opened.querySelector("[role=listbox]").setAttribute("aria-label", nameOf(select))
  }

  function nameAll(within) {
    for (const box of within.querySelectorAll(".select2-container")) box.querySelector(".select2-dropdown") ? nameOpened(box) : nameBox(box)
  }

  new MutationObserver((changes) => {
    const added = changes.flatMap((change) => [...change.addedNodes]).filter((node) => node.nodeType === Node.ELEMENT_NODE)
    if (added.some((node) => node.matches(".select2-container") || node.querySelector(".select2-container"))) nameAll(document)
  }).observe(document, { childList: true, subtree: true })

  const labelOf = (field) => field.closest(".field-line, .form-row")?.querySelector("label")?.textContent.replace(/[*:]/g, "").trim() ?? ""

  function makeButton(sign) {
    sign.setAttribute("role", "button")
    sign.setAttribute("aria-label", "Show or hide the menu")
    sign.tabIndex = 0
    sign.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return
      event.preventDefault()
      sign.click()
    })
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("searchbar-submit")?.setAttribute("aria-label", "Search")
    for (const field of document.querySelectorAll("input[placeholder]:not([aria-label])")) {
      if (!field.labels.length) field.setAttribute("aria-label", `${labelOf(field)} ${field.placeholder}`.trim())
    }
    for (const more of document.querySelectorAll("a[x-on\\:click*=showActions]")) more.setAttribute("aria-label", "More to do")
    for (const sign of document.querySelectorAll("span[x-on\\:click^=sidebar]")) makeButton(sign)
  })
}
